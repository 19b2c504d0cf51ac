"""Save and Load: whole or not at all, found again, and every bad file answered with a sentence."""

from __future__ import annotations

import json
import os
import shutil
import struct

import numpy as np
import pytest

from . import workflows as w
from .test_nodes import picture, text


def checkpoints(graphs):
    return graphs.base / "models" / "checkpoints"


@pytest.fixture(scope="module")
def saved(graphs):
    """A whole checkpoint, and the picture made before it was saved."""
    outputs = graphs.outputs(w.stock_parts() | w.quantize() | w.sample(prefix="before") | w.save("saved/whole"))
    return checkpoints(graphs) / "saved" / "whole.safetensors", picture(graphs, outputs)


def load_graph(file_name: str) -> dict:
    return w.stock_parts() | w.load_quantized(file_name) | w.sample(model="load", prefix="loaded")


def leftovers(graphs) -> list[str]:
    return [path.name for path in graphs.base.joinpath("models").rglob("*.part")]


def header_of(path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path, header: dict, body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_load_gives_the_same_picture_bit_for_bit(graphs, saved):
    outputs = graphs.outputs(load_graph("checkpoints/saved/whole.safetensors"))
    assert np.array_equal(picture(graphs, outputs), saved[1])
    assert "with CLIP and VAE" in text(outputs, "load")


def test_save_writes_a_unet_alone_when_clip_and_vae_are_not_connected(graphs, saved):
    graphs.outputs(w.stock_parts() | w.quantize() | w.save("unet-only", whole=False))
    path = graphs.base / "models" / "diffusion_models" / "unet-only.safetensors"
    assert path.stat().st_size < saved[0].stat().st_size / 2
    graph = w.stock_parts() | {"quantize": w.node("StepQuantLoad", file_name="diffusion_models/unet-only.safetensors")}
    outputs = graphs.outputs(graph | w.sample(prefix="unet"))
    assert np.array_equal(picture(graphs, outputs), saved[1])
    assert "UNet only" in text(outputs, "quantize")


def test_save_records_name_and_sha256_of_the_base_model(graphs, saved):
    import hashlib

    base = json.loads(header_of(saved[0])[0]["__metadata__"]["stepquant"])["base_model"]
    assert base["name"] == "demo.safetensors"
    assert base["sha256"] == hashlib.sha256((checkpoints(graphs) / "demo.safetensors").read_bytes()).hexdigest()


def test_load_lists_our_files_and_no_others(graphs, saved):
    options = graphs.schemas()["StepQuantLoad"]["input"]["required"]["file_name"][1]["options"]
    assert "checkpoints/saved/whole.safetensors" in options
    assert "checkpoints/demo.safetensors" not in options


def test_load_reads_a_replaced_file_again(graphs, saved):
    path = checkpoints(graphs) / "replaced.safetensors"
    shutil.copy(saved[0], path)
    graph = load_graph("checkpoints/replaced.safetensors")
    graphs.outputs(graph)
    path.write_bytes(path.read_bytes()[:1000])
    assert "damaged or incomplete" in graphs.failure(graph)


def test_save_keeps_an_existing_file_unless_told_otherwise(graphs, saved):
    before = saved[0].read_bytes()
    sentence = graphs.failure(w.stock_parts() | w.quantize() | w.save("saved/whole", whole=True) | w.sample(prefix="again"))
    assert "exists already" in sentence and "switch overwrite on" in sentence
    assert saved[0].read_bytes() == before
    graphs.outputs(w.stock_parts() | w.quantize() | w.save("saved/whole", overwrite=True))


def test_save_refuses_a_model_that_is_not_quantized(graphs):
    graph = w.stock_parts() | {"save": w.node("StepQuantSave", model=["load", 0], file_name="plain", overwrite=False)}
    assert "not quantized" in graphs.failure(graph)
    assert not list(graphs.base.joinpath("models").rglob("plain*"))


def test_save_refuses_a_name_that_leaves_the_models_folder(graphs):
    assert "not a usable name" in graphs.failure(w.stock_parts() | w.quantize() | w.save("../../outside"))
    assert not list(graphs.base.parent.rglob("outside*"))


def test_save_leaves_nothing_behind_when_cancelled(graphs):
    graphs.outputs(w.stock_parts() | w.quantize() | w.sample())
    answer = graphs.run(w.stock_parts() | w.quantize() | w.sample() | w.save("cancelled"), cancel_after=1)
    assert not answer["success"] and answer["failure"]["node_type"] == "StepQuantSave"
    assert not (checkpoints(graphs) / "cancelled.safetensors").exists() and not leftovers(graphs)


LARGE = {
    "save": w.quantize() | w.save("too-large"),
    "export": w.quantize() | {"save": {**w.save("too-large")["save"], "class_type": "StepQuantExportNative"}},
    "calibrate": w.calibrate(seed=41, file_name="too-large"),
}


@pytest.mark.skipif(os.name == "nt" or not os.path.exists("/dev/full"), reason="needs a Linux kernel's limits")
@pytest.mark.parametrize("work", LARGE)
def test_a_full_disk_is_named_and_nothing_is_left_behind(graphs, work):
    graphs.outputs(w.stock_parts() | w.quantize() | w.sample())
    graphs.limit_file_size(4 * 2**20)
    try:
        sentence = graphs.failure(w.stock_parts() | LARGE[work])
    finally:
        graphs.limit_file_size(None)
    assert "too-large.safetensors: writing failed" in sentence and "Free disk space" in sentence
    assert not list(graphs.base.joinpath("models").rglob("too-large*")) and not leftovers(graphs)


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="needs a folder that even root cannot write to")
def test_save_says_so_when_the_folder_is_read_only(graphs):
    (checkpoints(graphs) / "read-only").symlink_to("/sys/kernel", target_is_directory=True)
    sentence = graphs.failure(w.stock_parts() | w.quantize() | w.save("read-only/model"))
    assert "cannot write here" in sentence and "Choose a folder" in sentence


def test_save_says_so_when_the_folder_cannot_be_made(graphs):
    (checkpoints(graphs) / "occupied").write_text("")
    assert "cannot make this folder" in graphs.failure(w.stock_parts() | w.quantize() | w.save("occupied/model"))


def test_load_names_a_file_that_is_not_there(graphs):
    answer = graphs.run(load_graph("checkpoints/nowhere.safetensors"))
    assert not answer["valid"]
    assert "checkpoints/nowhere.safetensors: no such file" in str(answer["node_errors"])


@pytest.mark.parametrize("name", ["checkpoints/../../secret", "loras/x.safetensors", "whole.safetensors", ""])
def test_load_looks_in_its_folders_only(graphs, name):
    answer = graphs.run(load_graph(name))
    assert not answer["valid"] and "no such file in models/checkpoints or models/diffusion_models" in str(answer["node_errors"])


def test_load_refuses_a_stock_checkpoint(graphs):
    assert "this is not a StepQuant model" in graphs.failure(load_graph("checkpoints/demo.safetensors"))


def _newer(header, body):
    ours = json.loads(header["__metadata__"]["stepquant"])
    header["__metadata__"]["stepquant"] = json.dumps({**ours, "version": 99})
    return header, body


def _nan_scale(header, body):
    start, _ = next(spec["data_offsets"] for key, spec in header.items() if key.endswith("attn1.to_q.weight_scale"))
    return header, body[:start] + struct.pack("<f", float("nan")) + body[start + 4 :]


def _truncated(header, body):
    return header, body[: len(body) // 2]


def _missing_layer(header, body):
    key = next(key for key in header if key.endswith("attn1.to_q.qweight"))
    header[key.replace("qweight", "elsewhere")] = header.pop(key)
    return header, body


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_newer, "made by a newer StepQuant"),
        (_nan_scale, "attn1.to_q: weight_scale must be"),
        (_truncated, "damaged or incomplete"),
        (_missing_layer, "attn1.to_q.qweight is missing"),
    ],
    ids=["newer", "nan", "truncated", "missing"],
)
def test_load_says_what_is_wrong_with_a_bad_file(graphs, saved, damage, expected):
    path = checkpoints(graphs) / f"bad{damage.__name__}.safetensors"
    rewrite(path, *damage(*header_of(saved[0])))
    sentence = graphs.failure(load_graph(f"checkpoints/{path.name}"))
    assert path.name in sentence and expected in sentence


def test_stock_loaders_refuse_our_files(graphs, saved):
    graph = w.stock_parts()
    graph["load"]["inputs"]["ckpt_name"] = "saved/whole.safetensors"
    answer = graphs.run(graph | w.sample(model="load", prefix="stock"))
    assert not answer["success"], "a stock loader made a picture of codes"
