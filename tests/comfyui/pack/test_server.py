"""The server started for real: what it serves of the pack, and the example workflow queued over HTTP."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from stepquant.quant.file_format import read_header

from . import workflows as w
from .comfy_server import ComfyServer
from .conftest import PACK_FOLDER, make_base
from .demo_addons import write_controlnet, write_lora
from .test_entry import IDS
from .ui_workflow import to_api

ROOT = Path(__file__).resolve().parents[3]
LORA, CONTROLNET = "demo_lora.safetensors", "demo_controlnet.safetensors"
# SDXL's own workflows in the package that ComfyUI's template browser shows; the refiner's place is taken by the demo model.
TEMPLATES = ("sdxl_simple_example", "sdxl_refiner_prompt_example", "sdxlturbo_example")
WITH_REPORT, TITLE = 560, 30  # heights on the canvas; three kinds of layers
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))


@pytest.fixture(scope="module")
def base(demo_checkpoint, tmp_path_factory) -> Path:
    folder = make_base(tmp_path_factory.mktemp("server"), demo_checkpoint)
    (folder / "models" / "controlnet").mkdir()
    write_lora(folder / "models" / "loras" / LORA)
    write_controlnet(folder / "models" / "controlnet" / CONTROLNET)
    (folder / "input").mkdir(exist_ok=True)
    Image.new("RGB", (64, 64), "red").save(folder / "input" / "example.png")
    return folder


@pytest.fixture(scope="module")
def server(comfyui_path, base):
    running = ComfyServer(comfyui_path, base)
    yield running
    running.stop()


def picture(server: ComfyServer, history: dict, node: str) -> np.ndarray:
    assert history["status"]["status_str"] == "success", json.dumps(history["status"])[:3000]
    image = history["outputs"][node]["images"][0]
    body = server.get(f"/view?filename={quote(image['filename'])}&subfolder={image['subfolder']}&type={image['type']}")
    return np.asarray(Image.open(io.BytesIO(body)))


def adapted(workflow: dict, object_info: dict, steps: int = w.STEPS) -> tuple[dict, str]:
    """A workflow for the demo model, smaller and shorter. Returns it in API form, and the id of a node that shows pictures."""
    prompt = to_api(workflow, object_info)
    names = {"ckpt_name": "demo.safetensors", "lora_name": LORA, "control_net_name": CONTROLNET, "file_name": "example", "runs": 1}
    for node in prompt.values():
        inputs = node["inputs"]
        inputs.update({key: value for key, value in names.items() if key in inputs})
        inputs.update({key: w.SIDE for key in ("width", "height") if key in inputs})
        if "steps" in inputs:  # base and refiner share the steps at this point
            total = inputs["steps"]
            shared = {key: round(steps * min(1, inputs[key] / total)) for key in ("start_at_step", "end_at_step") if key in inputs}
            inputs.update(shared, steps=min(total, steps))
    return prompt, next(identifier for identifier, node in prompt.items() if node["class_type"] in ("SaveImage", "PreviewImage"))


def quantized(prompt: dict) -> dict:
    """The graph with Quantize SDXL behind every checkpoint loader."""
    loaders = [identifier for identifier, node in prompt.items() if node["class_type"] == "CheckpointLoaderSimple"]
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in loaders and value[1] == 0:
                node["inputs"][name] = [f"quantize{value[0]}", 0]
    ours = {f"quantize{one}": w.node("StepQuantQuantize", model=[one, 0], preset="w8a8-token", timestep_groups=8) for one in loaders}
    return prompt | ours


def test_server_offers_every_node(server):
    assert server.get("/object_info").keys() >= IDS


def test_server_serves_a_help_page_for_every_node(server):
    for node_id in IDS:
        assert server.get(f"/extensions/{quote(PACK_FOLDER)}/docs/{node_id}.md").startswith(b"# ")


def test_server_serves_the_front_end_scripts(server):
    scripts = {path.rpartition("/")[2]: path for path in server.get("/extensions") if PACK_FOLDER in path}
    assert scripts.keys() == {"node_panel.js", "report_view.js", "shared_file.js", "sidebar.js"}
    assert sum(b"registerExtension" in server.get(path) for path in scripts.values()) == 3
    assert server.get(f"/extensions/{quote(PACK_FOLDER)}/report.css")


def test_server_hands_out_the_translations(server):
    for language, name in (("en", "Quantize SDXL"), ("zh", "量化 SDXL"), ("ja", "SDXL を量子化")):
        assert server.get("/i18n")[language]["nodeDefs"]["StepQuantQuantize"]["display_name"].startswith(name)


def test_server_answers_what_a_workflow_remembers(server, base):
    def ask(known) -> dict:
        return json.loads(server._post("/stepquant/v1/file", known))

    assert "checkpoints/away.safetensors: no such file" in ask({"file": "checkpoints/away.safetensors"})["message"]
    assert "not a StepQuant model" in ask({"file": "checkpoints/demo.safetensors"})["message"]
    assert "no such file" in ask({"file": "../../server.log"})["message"]
    for hostile in ([], "x" * 200_000):
        with pytest.raises(AssertionError, match="refused"):
            ask(hostile)


def test_server_lists_the_example_workflows_with_their_pictures(server):
    listed = server.get("/workflow_templates")[PACK_FOLDER]
    assert set(listed) == {example.stem for example in EXAMPLES}
    for name in listed:
        assert server.get(f"/api/workflow_templates/{quote(PACK_FOLDER)}/{name}.jpg")[:3] == b"\xff\xd8\xff"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_workflow_makes_a_picture_over_http(server, example):
    prompt, shown = adapted(json.loads(example.read_text(encoding="utf-8")), server.get("/object_info"))
    made = picture(server, server.run(prompt), shown)
    assert made.std() > 5 and (made.shape == (w.SIDE, w.SIDE, 3) or "compare" in example.stem)


def test_small_file_example_saves_four_bit_weights_and_decodes_in_tiles(server, base):
    example = json.loads((ROOT / "example_workflows" / "small_file_for_a_4_gb_card.json").read_text(encoding="utf-8"))
    prompt, shown = adapted(example, server.get("/object_info"))
    saver = next(node for node in prompt.values() if node["class_type"] == "StepQuantSave")
    saver["inputs"]["file_name"] = "small"
    picture(server, server.run(prompt), shown)
    path = base / "models" / "checkpoints" / "small.safetensors"
    bits = [scheme.weight_bits for scheme in read_header(path).recipe.schemes.values()]
    assert bits.count(4) > bits.count(8) > 0
    assert "VAEDecodeTiled" in {node["class_type"] for node in prompt.values()}


@pytest.mark.parametrize("template", TEMPLATES)
def test_template_of_comfyui_makes_a_like_picture_with_our_node_inserted(server, template):
    workflow = json.loads(_template(template).read_text(encoding="utf-8"))
    prompt, shown = adapted(workflow, server.get("/object_info"), steps=20)  # fewer make a rough picture, which exaggerates differences
    original = picture(server, server.run(prompt), shown).astype(float)
    ours = picture(server, server.run(quantized(prompt)), shown).astype(float)
    assert original.shape == (w.SIDE, w.SIDE, 3)
    assert 0.7 < np.corrcoef(original.ravel(), ours.ravel())[0, 1] < 1 - 1e-9


def _template(name: str) -> Path:
    package = importlib.util.find_spec("comfyui_workflow_templates_json")
    assert package is not None, "ComfyUI's requirement comfyui-workflow-templates is not installed here"
    return next(Path(package.submodule_search_locations[0]).rglob(f"{name}.json"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_workflow_is_sound(example):
    """What the front end needs to open it: links that agree from both ends, and a picture of the same name."""
    workflow = json.loads(example.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert workflow["last_node_id"] == max(nodes) and workflow["last_link_id"] == max(link[0] for link in workflow["links"])
    for identifier, source, output, target, slot, kind in workflow["links"]:
        assert nodes[source]["outputs"][output]["type"] == nodes[target]["inputs"][slot]["type"] == kind
        assert identifier in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == identifier
    assert example.with_suffix(".jpg").is_file()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_workflow_leaves_room_for_the_reports(example):
    """Quantize's panel appears with the first run and makes the node taller: the prompts must not lie under it."""
    nodes = json.loads(example.read_text(encoding="utf-8"))["nodes"]
    heights = {"StepQuantQuantize": WITH_REPORT}
    for one, other in itertools.combinations(sorted(nodes, key=lambda node: node["pos"][1]), 2):
        beside = one["pos"][0] + one["size"][0] <= other["pos"][0] or other["pos"][0] + other["size"][0] <= one["pos"][0]
        assert beside or one["pos"][1] + heights.get(one["type"], one["size"][1]) <= other["pos"][1] - TITLE, (one["type"], other["type"])


def test_cancel_button_stops_a_calibration_and_leaves_no_file(server, base):
    identifier = server.queue(w.stock_parts() | w.calibrate(runs=256, steps=50, file_name="cancelled"))
    server.wait_for_log("0/50")  # the sampler's progress bar: it is at work
    server.interrupt()
    status = server.result(identifier)["status"]
    assert "execution_interrupted" in [message for message, _ in status["messages"]]
    assert not list(base.rglob("*cancelled*"))


def test_saved_model_gives_the_same_picture_after_a_restart(comfyui_path, base, server):
    """Uses up the module's server: keep it last."""
    before = server.run(w.stock_parts() | w.quantize() | w.sample(prefix="before") | w.save("restarted"))
    expected = picture(server, before, "picture")
    server.stop()
    second = ComfyServer(comfyui_path, base)
    try:
        history = second.run(
            w.stock_parts() | w.load_quantized("checkpoints/restarted.safetensors") | w.sample(model="load", prefix="after")
        )
        assert np.array_equal(picture(second, history, "picture"), expected)
    finally:
        second.stop()
