"""Tuning inside ComfyUI: in a node's inference mode, models left as they were, cancel and resume, refusals."""

import comfy.memory_management
import comfy.model_management
import pytest
import torch
from sampling_run import conditioning

from stepquant.errors import ModelError
from stepquant.hosts.comfy import tune as tune_module
from stepquant.hosts.comfy.progress_text import TimeLeft
from stepquant.hosts.comfy.quantize import quantize_model
from stepquant.hosts.comfy.sampling import SamplerSettings
from stepquant.hosts.comfy.scale_lora import with_scale_lora
from stepquant.hosts.comfy.tune import Pictures, record_calls, tune_model
from stepquant.quant.tuning.training import TuningSettings, load_state

SAMPLER = SamplerSettings(2, 4.0, "euler", "normal")
SIDE = 8


def tune(quantized, model, settings, **others):
    latent = {"samples": torch.zeros(1, 4, SIDE, SIDE)}
    return tune_model(quantized, model, conditioning(11), conditioning(12), latent, 1, SAMPLER, 1, settings, **others)


def distance(quantized, calls):
    """Of the quantized MODEL's answers to recorded calls, in its own sampling's surroundings."""
    quantized.patch_model()
    try:
        quantized.pre_run()
        unet = quantized.model.diffusion_model
        return sum(float((unet(call.x, call.timesteps, call.context, call.y) - call.output).square().mean()) for call in calls)
    finally:
        quantized.unpatch_model()


def test_repair_in_inference_mode_brings_the_quantized_model_nearer(model, sample, snapshot):
    quantized = quantize_model(model, "w4a8-token")
    before = sample(model), sample(quantized), snapshot(quantized)
    scales = tune(quantized, model, TuningSettings(steps=30, learning_rate=2e-3))
    assert torch.is_inference_mode_enabled()
    latent = {"samples": torch.zeros(1, 4, SIDE, SIDE)}
    calls = record_calls(model, conditioning(11), conditioning(12), latent, 1, SAMPLER)
    tuned = with_scale_lora(quantized, scales, 1.0, "tuned")
    assert distance(tuned, calls) < 0.95 * distance(quantized, calls)
    assert torch.equal(sample(model), before[0]) and torch.equal(sample(quantized), before[1])
    after = snapshot(quantized)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before[2].items())


def test_pictures_are_learnt_with_what_comfyui_hands_the_unet(model, quantized):
    pictures = Pictures(torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(1)), conditioning(13))
    scales = tune(quantized, model, TuningSettings(steps=3, batch_size=2, experts=2), pictures=pictures)
    assert scales.experts == 2 and scales.summary["kind"] == "pictures"
    assert any(bool(table.any()) for table in scales.out.values())


def test_cancelled_tuning_goes_on_from_its_state(model, quantized, tmp_path, monkeypatch):
    settings, file = TuningSettings(steps=6, learning_rate=1e-3), tmp_path / "scales.state"
    whole = tune(quantized, model, settings)

    class Cancelled(TimeLeft):
        """The artist cancels after the third training step."""

        def show(self, done):
            if done == 3:
                raise comfy.model_management.InterruptProcessingException

    with monkeypatch.context() as patched, pytest.raises(comfy.model_management.InterruptProcessingException):
        patched.setattr("stepquant.hosts.comfy.tune.TimeLeft", Cancelled)
        tune(quantized, model, settings, on_cancel=lambda state: state.save(file))
    state = load_state(file)
    assert state.step == 3
    resumed = tune(quantized, model, settings, start=state)
    for name, table in whole.out.items():
        assert torch.allclose(resumed.out[name], table, atol=1e-5), name


def test_tune_is_refused_in_words_with_the_wrong_models(model, quantized):
    for first, second in ((model, model), (quantized, quantized)):
        with pytest.raises(ModelError, match="16-bit model"):
            tune(first, second, TuningSettings(steps=1))


def test_tuning_of_a_large_model_keeps_less_and_ends_with_the_same_factors(model, quantized, monkeypatch):
    """Full-size SDXL's way: blocks are computed a second time on the way back."""
    settings, kept, results = TuningSettings(steps=2, learning_rate=1e-3), [], []
    for least in (tune_module.RECOMPUTES_FROM, 0):
        monkeypatch.setattr(tune_module, "RECOMPUTES_FROM", least)
        seen: list[int] = []

        def pack(tensor, seen=seen):
            seen.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results.append(tune(quantized, model, settings))
        kept.append(sum(seen))
    assert kept[1] < 0.5 * kept[0]
    assert all(torch.allclose(table, results[0].out[name], atol=1e-6) for name, table in results[1].out.items())


def test_tuning_works_under_dynamic_vram_where_comfyuis_own_linear_has_no_weight(model, quantized, monkeypatch):
    settings = TuningSettings(steps=2, learning_rate=1e-3)
    wanted = tune(quantized, model, settings)
    twin_of = tune_module._float_twin

    def under_dynamic_vram(*arguments):
        with monkeypatch.context() as patched:
            patched.setattr(comfy.memory_management, "aimdo_enabled", True)
            return twin_of(*arguments)

    monkeypatch.setattr(tune_module, "_float_twin", under_dynamic_vram)
    found = tune(quantized, model, settings)
    assert all(torch.equal(table, wanted.out[name]) for name, table in found.out.items())
