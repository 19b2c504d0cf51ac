"""Calibration of a live MODEL: what is recorded, and that nothing of it stays on the model."""

import comfy.model_management
import comfy.model_sampling
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from sampling_run import conditioning

from stepquant.errors import CalibrationError, ModelError
from stepquant.hosts.comfy import calibrate as module
from stepquant.hosts.comfy.calibrate import calibrate
from stepquant.hosts.comfy.quantize import quantize_model
from stepquant.hosts.comfy.sampling import SamplerSettings
from stepquant.quant.layers import find_layers
from stepquant.quant.observer import ROWS_KEPT

SETTINGS = SamplerSettings(steps=4, cfg=4.0, sampler_name="euler", scheduler="normal")


def run(model, settings=SETTINGS, runs=1, batch=1):
    latent = {"samples": torch.zeros(batch, 4, 16, 16)}
    return calibrate(model, conditioning(1), conditioning(2), latent, 5, settings, runs)


def layers_of(model: ModelPatcher) -> dict:
    return find_layers({name: tensor.shape for name, tensor in model.model.diffusion_model.state_dict().items()})


def hooks_on(model: ModelPatcher) -> int:
    return sum(len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in model.model.diffusion_model.modules())


def test_calibrate_observes_every_quantizable_layer(model):
    calibration = run(model)
    expected = layers_of(model)
    assert calibration.layers.keys() == expected.keys()
    for name, statistics in calibration.layers.items():
        assert statistics.range_min.shape == (len(statistics.buckets), expected[name].in_channels), name
        assert torch.isfinite(statistics.range_min).all() and (statistics.range_min <= statistics.range_max).all(), name


def test_calibrate_records_the_input_that_the_layer_is_given(model):
    name, seen = "input_blocks.4.1.transformer_blocks.0.attn1.to_q", []
    layer = model.model.diffusion_model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0].clone()))
    statistics = run(model).layers[name]
    handle.remove()
    everything = torch.cat(seen).flatten(0, 1).float()
    assert torch.equal(statistics.range_min.amin(0), everything.amin(0))
    assert torch.equal(statistics.range_max.amax(0), everything.amax(0))
    assert int(statistics.count.sum()) == len(everything)


def test_calibrate_visits_the_buckets_of_the_schedule(model):
    buckets = run(model).layers["middle_block.0.in_layers.2"].buckets
    assert len(buckets) == SETTINGS.steps
    assert int(buckets.max()) == 63, "the first step is at t = 999"


def test_calibrate_visits_only_the_late_buckets_when_denoise_is_low(model):
    settings = SamplerSettings(steps=4, cfg=4.0, sampler_name="euler", scheduler="normal", denoise=0.3)
    assert int(run(model, settings).layers["middle_block.0.in_layers.2"].buckets.max()) < 24


class _Edm(comfy.model_sampling.ModelSamplingContinuousEDM, comfy.model_sampling.EDM):
    """What ComfyUI's ModelSamplingContinuousEDM node puts on a model: the UNet is given 0.25 ln(sigma)."""


class _ZeroTerminalSnr(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
    """What ComfyUI's ModelSamplingDiscrete node puts on a model for v-prediction with zsnr."""

    def __init__(self, config):
        super().__init__(config, zsnr=True)


@pytest.mark.parametrize("sampling", [_Edm, _ZeroTerminalSnr])
def test_calibrate_uses_the_buckets_that_the_quantized_model_will(model, sampling, monkeypatch):
    patched = model.clone()
    patched.add_object_patch("model_sampling", sampling(model.model.model_config))
    calibrated = {int(bucket) for bucket in run(patched).layers["middle_block.0.in_layers.2"].buckets}

    quantized = quantize_model(patched, "w8a8-token")
    tap, used = quantized.model.stepquant.tap, set()
    observe = tap.observe
    monkeypatch.setattr(tap, "observe", lambda embedding: (observe(embedding), used.update(tap.bucket.tolist())))
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    module.sample_latent(quantized, conditioning(1), conditioning(2), latent, 5, SETTINGS)
    assert calibrated == used
    assert len(used) > 1


def test_calibrate_leaves_the_model_as_it_was(model, sample):
    before = sample(model)
    keys = set(model.model_options["transformer_options"])
    run(model)
    assert hooks_on(model) == 0
    assert set(model.model_options["transformer_options"]) == keys
    assert torch.equal(sample(model), before)


def test_calibrate_leaves_nothing_when_cancelled_in_the_middle(model, monkeypatch):
    calls = []

    def cancel_in_third_step(_bar, value, *args, **kwargs):
        calls.append(hooks_on(model))
        if value == 3:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr("comfy.utils.ProgressBar.update_absolute", cancel_in_third_step)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(model)
    assert len(calls) == 3 and calls[0] > 0, "the observers were there while it ran"
    assert hooks_on(model) == 0


def test_calibrate_keeps_memory_bounded_over_runs_and_batches(model):
    calibration = run(model, runs=2, batch=2)
    for statistics in calibration.layers.values():
        assert len(statistics.rows) <= ROWS_KEPT and len(statistics.buckets) == SETTINGS.steps


def test_calibrate_counts_seeds_up_and_wraps_them(model, monkeypatch):
    seeds = []
    monkeypatch.setattr(module, "sample_latent", lambda model, p, n, latent, seed, *rest: seeds.append(seed))
    with pytest.raises(CalibrationError):
        calibrate(model, [], [], {"samples": torch.zeros(1, 4, 16, 16)}, 2**64 - 1, SETTINGS, 2)
    assert seeds == [2**64 - 1, 0]


def test_calibrate_says_so_when_no_layer_could_be_observed(model, monkeypatch):
    monkeypatch.setattr(module, "sample_latent", lambda *args: None)
    with pytest.raises(CalibrationError, match=r"no layer.*torch\.compile"):
        run(model)


def test_calibrate_refuses_a_quantized_model(model):
    with pytest.raises(ModelError, match=r"quantized already\. Connect the 16-bit model"):
        run(quantize_model(model, "w8a8-token"))


def test_calibrated_static_model_samples_close_to_the_original(model, sample):
    calibration = run(model, runs=2)
    quantized = quantize_model(model, "w8a8-static", calibration)
    reference, result = sample(model), sample(quantized)
    assert torch.linalg.vector_norm(result - reference) / torch.linalg.vector_norm(reference) < 0.2
