"""Workflows that travel: they remember their file, say what is wrong with another one, and a native file needs no StepQuant."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from . import workflows as w
from .test_files import header_of, rewrite
from .test_nodes import picture, text

NAME = "checkpoints/shared.safetensors"


@pytest.fixture(scope="module")
def saved(graphs):
    graphs.outputs(w.stock_parts() | w.quantize() | w.save("shared"))
    return graphs.base / "models" / NAME


def load_alone(seed: int = 0) -> dict:
    graph = w.stock_parts() | w.load_quantized(NAME) | {"show": w.node("PreviewAny", source=["load", 0])}
    graph["positive"]["inputs"]["text"] = f"another run {seed}"
    return graph


def workflow_with(properties: dict) -> dict:
    """What the browser sends along: the graph as it would be saved, here inside of a subgraph too."""
    node = {"id": "load", "type": "StepQuantLoad", "properties": properties}
    return {"workflow": {"nodes": [node], "links": []}}


@pytest.fixture(scope="module")
def identity(graphs, saved):
    return graphs.outputs(load_alone())["load"]["stepquant_file"][0]


def test_load_tells_the_workflow_what_to_remember(identity, saved):
    assert identity["file"] == NAME and identity["size_bytes"] == saved.stat().st_size
    assert identity["sha256"] == hashlib.sha256(saved.read_bytes()).hexdigest()
    assert identity["preset"] == "w8a8-token" and identity["base_model"]["name"] == "demo.safetensors"
    assert identity["schemes"] == [{"label": "W8, token, int8", "layers": 223}, {"label": "W8, token with zero point, int8", "layers": 34}]


def test_pictures_of_the_first_run_carry_it(graphs, saved, identity):
    graph = w.stock_parts() | w.load_quantized(NAME) | w.sample(model="load", prefix="carried")
    saved.touch()  # not from ComfyUI's cache
    answer = graphs.run(graph, extra_pnginfo=workflow_with({}))
    assert answer["success"], answer
    from PIL import Image

    image = answer["outputs"]["picture"]["images"][0]
    written = json.loads(Image.open(graphs.base / image["type"] / image["subfolder"] / image["filename"]).text["workflow"])
    assert written["nodes"][0]["properties"]["stepquant_file"] == identity


def test_another_file_of_the_same_name_is_named_and_still_runs(graphs, saved, identity):
    saved.touch()
    known = {**identity, "sha256": "0" * 64}
    answer = graphs.run(load_alone(1), extra_pnginfo=workflow_with({"stepquant_file": known}))
    assert answer["success"]
    said = text(answer["outputs"], "load")
    assert f"{NAME}: another file than this workflow was made with" in said and "Put that file in its place" in said
    assert answer["outputs"]["load"]["stepquant_file"] == [known], "the workflow stays that of the other file"


def test_a_file_elsewhere_is_pointed_out(graphs, saved):
    graph = w.stock_parts() | w.load_quantized("diffusion_models/shared.safetensors") | w.sample(model="load")
    assert f"but there is {NAME}. Choose that one." in str(graphs.run(graph)["node_errors"])


def test_a_newer_file_asks_for_an_update(graphs, saved):
    header, body = header_of(saved)
    ours = json.loads(header["__metadata__"]["stepquant"])
    header["__metadata__"]["stepquant"] = json.dumps({**ours, "version": 99})
    rewrite(saved.with_name("newer.safetensors"), header, body)
    sentence = graphs.failure(w.stock_parts() | w.load_quantized("checkpoints/newer.safetensors") | w.sample(model="load"))
    assert "newer.safetensors: made by a newer StepQuant" in sentence and "Update StepQuant" in sentence


@pytest.mark.parametrize("whole", [True, False], ids=["checkpoint", "unet"])
def test_native_file_makes_a_picture_without_our_nodes(graphs, whole):
    export = {"save": {**w.save("native", whole=whole)["save"], "class_type": "StepQuantExportNative"}}
    outputs = graphs.outputs(w.stock_parts() | w.quantize() | export | w.sample(prefix="ours"))
    assert "opens in ComfyUI's own Load" in text(outputs, "save")
    graph = w.stock_parts()
    if whole:
        graph["load"]["inputs"]["ckpt_name"] = "native.safetensors"
    graph["unet"] = w.node("UNETLoader", unet_name="native.safetensors", weight_dtype="default")
    native = graphs.outputs(graph | w.sample(model="load" if whole else "unet", prefix="native"))
    one, other = (picture(graphs, each).astype(float).ravel() for each in (outputs, native))
    assert np.corrcoef(one, other)[0, 1] > 0.7


def test_report_is_in_the_history_for_those_without_a_browser(graphs):
    outputs = graphs.outputs(w.stock_parts() | w.quantize() | w.compare(runs=1))
    quantized, compared = (outputs[node]["stepquant_report"][0] for node in ("quantize", "compare"))
    assert [size["label"] for size in quantized["sizes"]] == ["fp16", "StepQuant"]
    assert quantized["sizes"][1]["bytes"] < 0.6 * quantized["sizes"][0]["bytes"]
    assert len(compared["steps_db"]) == w.STEPS and all(20 < value < 80 for value in compared["steps_db"])
    assert set(compared["pictures"]) == {"before", "after"} and len(outputs["compare"]["images"]) == 2
    assert compared["layers"] == [], "every layer ran as integers"
