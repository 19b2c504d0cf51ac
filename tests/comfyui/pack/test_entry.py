"""How ComfyUI finds the pack: any folder name, nothing heavy at import, ComfyUI's own `nodes` untouched."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
IDS = {
    "StepQuantQuantize",
    "StepQuantCalibrate",
    "StepQuantLoadCalibration",
    "StepQuantPlan",
    "StepQuantSave",
    "StepQuantExportNative",
    "StepQuantLoad",
    "StepQuantLoadScaleLora",
    "StepQuantCorrections",
    "StepQuantTune",
    "StepQuantCompare",
    "StepQuantSaveTextEncoders",
    "StepQuantLoadTextEncoders",
    "StepQuantSystemCheck",
}

# Loads the pack as ComfyUI does and reports what that brought with it.
PROBE = """
import asyncio, json, os, sys
comfyui, pack = sys.argv[1:3]
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch, execution, server, nodes
loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
server.PromptServer(loop)
before = set(sys.modules)
loaded = loop.run_until_complete(nodes.load_custom_node(pack))
package = pack.replace(".", "_x_")
brought = set(sys.modules) - before
sys.stdout.write("ANSWER" + json.dumps({
    "loaded": loaded,
    "ids": [name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("StepQuant")],
    "own": sorted(name.removeprefix(package + ".") for name in brought if name.startswith(package)),
    "foreign": sorted(name for name in brought if not name.startswith(package)),
    "cuda": torch.cuda.is_initialized(),
    "nodes": nodes.__file__,
    "nodes_later": __import__("nodes").__file__,
    "path": [os.path.realpath(entry) for entry in sys.path],
}))
"""


@pytest.fixture(scope="module", params=["StepQuant v0.1-main", "ComfyUI-StepQuant"])
def probe(request, comfyui_path, tmp_path_factory) -> dict:
    pack = tmp_path_factory.mktemp("custom_nodes") / request.param
    pack.symlink_to(ROOT, target_is_directory=True)
    command = [sys.executable, "-c", PROBE, str(comfyui_path), str(pack)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, cwd=pack.parent)
    assert "ANSWER" in answer.stdout, answer.stderr[-3000:]
    return json.loads(answer.stdout.partition("ANSWER")[2])


def test_pack_loads_under_any_folder_name(probe):
    assert probe["loaded"] and set(probe["ids"]) == IDS


def test_loading_the_pack_touches_neither_cuda_nor_triton(probe):
    assert not probe["cuda"]
    heavy = {"triton", "comfy_kitchen", "scipy", "diffusers", "transformers", "matplotlib"}
    assert not heavy & {name.partition(".")[0] for name in probe["foreign"]}


def test_loading_the_pack_leaves_hosts_and_kernels_for_the_first_run(probe):
    early = [name for name in probe["own"] if name.startswith(("kernels", "hosts.comfy."))]
    assert early == ["hosts.comfy.version"]


def test_nodes_folder_never_shadows_comfyuis_nodes(probe, comfyui_path):
    expected = comfyui_path.resolve() / "nodes.py"
    assert Path(probe["nodes"]).resolve() == Path(probe["nodes_later"]).resolve() == expected
    assert str(ROOT) not in probe["path"]
