"""Tune scales, Load scale LoRA and Apply corrections, queued over HTTP on the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stepquant.demo.architecture import MODEL_DIR
from stepquant.quant.corrections.correction_file import Corrections, Verdict, save_corrections
from stepquant.quant.corrections.output import OutputCorrection
from stepquant.quant.layers import UNET_PREFIX
from stepquant.quant.tuning.identity import identity
from stepquant.quant.tuning.scale_file import load_scale_set

from . import workflows as w
from .comfy_server import ComfyServer
from .conftest import make_base
from .test_server import picture

SCALES = "tuned.safetensors"


@pytest.fixture(scope="module")
def base(demo_checkpoint, tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("scales"), demo_checkpoint)


@pytest.fixture(scope="module")
def server(comfyui_path, base):
    running = ComfyServer(comfyui_path, base)
    yield running
    running.stop()


def int4() -> dict:
    return w.stock_parts() | w.quantize("w4a8-token")


def tune(**inputs: object) -> dict:
    conditioning = {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    given = {"runs": 1, "tuning_steps": 3, "learning_rate": 0.002, "experts": "1", "prior_weight": 1.0, "file_name": "tuned"}
    models = {"model": ["quantize", 0], "original": ["load", 0]}
    return {"tune": w.node("StepQuantTune", **models, **conditioning, **w.SAMPLING, **(given | inputs))}


def load_scales(model: str = "quantize", strength: float = 1.0) -> dict:
    return {"scales": w.node("StepQuantLoadScaleLora", model=[model, 0], file_name=SCALES, strength=strength)}


@pytest.fixture(scope="module")
def tuned(server) -> np.ndarray:
    """The picture of a MODEL straight from Tune scales."""
    return picture(server, server.run(int4() | tune() | w.sample(model="tune", prefix="tuned")), "picture")


def test_tune_saves_a_scale_lora_that_the_loader_opens(server, base, tuned):
    path = base / "models" / "stepquant_scale_loras" / SCALES
    scales = load_scale_set(path)
    assert scales.summary["kind"] == "repair" and scales.summary["steps_done"] == 3
    loaded = server.run(int4() | load_scales() | w.sample(model="scales", prefix="loaded"))
    assert np.array_equal(picture(server, loaded, "picture"), tuned)
    assert "54848 scales in one set" in loaded["outputs"]["scales"]["text"][0]
    without = picture(server, server.run(int4() | w.sample(prefix="without")), "picture")
    assert not np.array_equal(without, tuned)
    still = server.run(int4() | load_scales(strength=0.0) | w.sample(model="scales", prefix="zero"))
    assert np.array_equal(picture(server, still, "picture"), without)


def test_loader_refuses_a_16_bit_model_in_one_sentence(server, tuned):
    history = server.run(w.stock_parts() | load_scales("load") | w.sample(model="scales", prefix="never"))
    assert "Put Quantize SDXL (StepQuant) or Load quantized before it" in json.dumps(history["status"])


def test_corrections_are_off_unless_they_helped(server, base):
    weights = load_file(MODEL_DIR / "unet.safetensors")
    known = identity(lambda name: weights[UNET_PREFIX + name], {"name": "demo"})
    gain, zeros = torch.full((64, 4), 0.9), torch.zeros(64, 4)
    tables = {"ptqd": OutputCorrection(gain, zeros, zeros)}
    folder = base / "models" / "stepquant_corrections"
    folder.mkdir(parents=True, exist_ok=True)
    save_corrections(Corrections(tables, {"ptqd": Verdict(30.0, 29.0, 20.0, 19.0)}, known), folder / "c.safetensors", "0")
    pictures = []
    for method in ("auto", "ptqd"):
        node = {"correct": w.node("StepQuantCorrections", model=["quantize", 0], file_name="c.safetensors", method=method)}
        history = server.run(int4() | node | w.sample(model="correct", prefix=method))
        pictures.append(picture(server, history, "picture"))
        assert "does not help" in history["outputs"]["correct"]["text"][0]
    plain = picture(server, server.run(int4() | w.sample(prefix="plain")), "picture")
    assert np.array_equal(pictures[0], plain) and not np.array_equal(pictures[1], plain)


def test_tune_learns_images_and_says_what_they_need(server, base):
    images = {"image": w.node("EmptyImage", width=w.SIDE, height=w.SIDE, batch_size=2, color=0x1896A0)}
    pictures = {"images": ["image", 0], "vae": ["load", 2], "subject": ["positive", 0]}
    graph = int4() | images | tune(**pictures, tuning_steps=1, batch=1, experts="2", file_name="subject")
    history = server.run(graph)
    assert "2 pictures" in history["outputs"]["tune"]["text"][0], json.dumps(history["status"])[-2000:]
    scales = load_scale_set(base / "models" / "stepquant_scale_loras" / "subject.safetensors")
    assert scales.summary["kind"] == "pictures" and scales.experts == 2
    without = server.run(int4() | images | tune(images=["image", 0], vae=["load", 2], file_name="subject"))
    assert "images are connected and subject is not" in json.dumps(without["status"])
