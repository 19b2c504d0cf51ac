"""The server started for real: what it serves of the pack, and the example workflow queued over HTTP."""

from __future__ import annotations

import io
import json
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from . import workflows as w
from .comfy_server import ComfyServer
from .conftest import PACK_FOLDER, make_base
from .test_entry import IDS
from .ui_workflow import to_api

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))


@pytest.fixture(scope="module")
def base(demo_checkpoint, tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("server"), demo_checkpoint)


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


def adapted(workflow: dict, object_info: dict) -> tuple[dict, str]:
    """The example for the demo model, smaller and shorter. Returns it in API form, and the id of its SaveImage."""
    prompt = to_api(workflow, object_info)
    for node in prompt.values():
        inputs = node["inputs"]
        inputs.update({key: value for key, value in {"ckpt_name": "demo.safetensors", "steps": w.STEPS}.items() if key in inputs})
        inputs.update({key: w.SIDE for key in ("width", "height") if key in inputs})
    return prompt, next(identifier for identifier, node in prompt.items() if node["class_type"] == "SaveImage")


def test_server_offers_every_node(server):
    assert server.get("/object_info").keys() >= IDS


def test_server_serves_a_help_page_for_every_node(server):
    for node_id in IDS:
        assert server.get(f"/extensions/{quote(PACK_FOLDER)}/docs/{node_id}.md").startswith(b"# ")


def test_server_serves_the_front_end_script(server):
    scripts = [path for path in server.get("/extensions") if PACK_FOLDER in path]
    assert scripts == [f"/extensions/{PACK_FOLDER}/node_text.js"]
    assert b"registerExtension" in server.get(scripts[0])


def test_server_lists_the_example_workflows_with_their_pictures(server):
    listed = server.get("/workflow_templates")[PACK_FOLDER]
    assert set(listed) == {example.stem for example in EXAMPLES}
    for name in listed:
        assert server.get(f"/api/workflow_templates/{quote(PACK_FOLDER)}/{name}.jpg")[:3] == b"\xff\xd8\xff"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_workflow_makes_a_picture_over_http(server, example):
    prompt, save = adapted(json.loads(example.read_text(encoding="utf-8")), server.get("/object_info"))
    history = server.run(prompt)
    assert picture(server, history, save).shape == (w.SIDE, w.SIDE, 3)


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
