"""The trained demo model in real ComfyUI: quality in dB on real activations, integers throughout, file included."""

import importlib.util
from pathlib import Path

import comfy.sd
import pytest
import torch

from stepquant.demo.checkpoint import MODEL_DIR, write_checkpoint
from stepquant.hosts.comfy.calibrate import calibrate
from stepquant.hosts.comfy.compare import compare_models
from stepquant.hosts.comfy.loader import load_quantized
from stepquant.hosts.comfy.quantize import quantize_model
from stepquant.hosts.comfy.sampling import SamplerSettings, sample_latent
from stepquant.hosts.comfy.save import save_quantized

pytestmark = pytest.mark.skipif(
    not (MODEL_DIR / "unet.safetensors").is_file(), reason="the demo model's weights are not in demo/model; the README says how to get them"
)
SETTINGS = SamplerSettings(steps=4, cfg=5.0, sampler_name="euler", scheduler="normal")
LATENT = {"samples": torch.zeros(1, 4, 32, 32)}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(model, vae, positive, negative) of the demo checkpoint, through ComfyUI's stock loader."""
    spec = importlib.util.spec_from_file_location("demo_arch", Path(MODEL_DIR).parent / "comfy_arch" / "__init__.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    path = write_checkpoint(tmp_path_factory.mktemp("demo") / "demo.safetensors")
    with torch.inference_mode():
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(path))
        prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red apple on a blue background", "")]
    return model, vae, *prompts


def test_demo_model_keeps_its_quality_in_int8(demo):
    model, vae, positive, negative = demo
    calibration = calibrate(model, positive, negative, LATENT, 100, SETTINGS)
    results = {}
    for preset in ("w8a8-token", "w8a8-static"):
        quantized = quantize_model(model, preset, calibration)
        results[preset] = compare_models(model, quantized, vae, positive, negative, LATENT, 5, SETTINGS)
    token, static = results["w8a8-token"], results["w8a8-static"]
    assert token.integer_share == static.integer_share == 1.0
    # One picture's latent, which varies by 10 dB; 64 together are measured by benchmarks/quality.py.
    assert token.step_sqnr.mean_db() > 30 and token.latent_sqnr_db > 14
    assert static.step_sqnr.mean_db() > token.step_sqnr.mean_db() - 3


def test_demo_model_comes_back_from_its_file_bit_for_bit(demo, tmp_path):
    model, _, positive, negative = demo
    quantized = quantize_model(model, "w8a8-token")
    saved = save_quantized(quantized, tmp_path / "demo-w8a8.safetensors")
    one, other = (sample_latent(m, positive, negative, LATENT, 5, SETTINGS) for m in (quantized, load_quantized(saved.path).model))
    assert torch.equal(one, other)
    assert saved.size_bytes < 0.55 * (MODEL_DIR / "unet.safetensors").stat().st_size
