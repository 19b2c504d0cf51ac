"""A ComfyUI that is too old refuses the pack in one readable sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
VARIABLE = "COMFYUI_TOO_OLD_PATH"

PROBE = """
import asyncio, logging, sys
comfyui, pack = sys.argv[1:3]
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import utils.extra_config  # as main.py does first: later ComfyUI puts a module of that name on the path
import execution, server, nodes
logging.getLogger().setLevel(logging.INFO)
loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
server.PromptServer(loop)
sys.stderr.write("LOADING\\n")
loaded = loop.run_until_complete(nodes.load_custom_node(pack))
sys.stderr.write(f"LOADED {loaded}\\n")
"""


def test_too_old_comfyui_refuses_the_pack_in_one_sentence(tmp_path):
    old = os.environ.get(VARIABLE)
    if not old:
        pytest.skip(f"{VARIABLE} does not name a ComfyUI older than 0.33.0, such as 0.3.64")
    pack = tmp_path / "StepQuant"
    pack.symlink_to(ROOT, target_is_directory=True)
    command = [sys.executable, "-c", PROBE, old, str(pack)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, cwd=tmp_path)
    said = answer.stderr.partition("LOADING\n")[2]
    assert said.endswith("LOADED False\n"), answer.stderr[-3000:]
    sentences = said.removesuffix("LOADED False\n").strip().splitlines()
    assert len(sentences) == 1 and "Traceback" not in said
    assert "ComfyUI 0.33.0 or newer is needed. Update ComfyUI." in sentences[0]
