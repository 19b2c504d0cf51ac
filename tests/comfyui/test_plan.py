"""Planning for a live MODEL: sensitivities from its own sampling run, its modes of calibration, and the predicted quality."""

import comfy.model_management
import comfy.sd
import pytest
import torch
from sampling_run import conditioning

from stepquant.errors import CalibrationError, ModelError
from stepquant.hosts.comfy.calibrate import calibrate
from stepquant.hosts.comfy.compare import compare_models
from stepquant.hosts.comfy.layouts import unpack
from stepquant.hosts.comfy.plan import plan_model
from stepquant.hosts.comfy.quantize import quantizable_layers, quantize_model, weight_reader
from stepquant.hosts.comfy.sampling import SamplerSettings
from stepquant.quant.plan_program import Budget

SETTINGS = SamplerSettings(steps=4, cfg=4.0, sampler_name="euler", scheduler="normal")
LAYER = "middle_block.0.in_layers.2"


def latent(**extra) -> dict:
    return {"samples": torch.zeros(1, 4, 8, 8), **extra}


def run(model, settings=SETTINGS, runs=1, given=None, **arguments):
    return calibrate(model, conditioning(1), conditioning(2), given or latent(), 5, settings, runs, **arguments)


def hooks_on(model) -> int:
    return sum(len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in model.model.diffusion_model.modules())


class PixelVae:
    def decode(self, latents):
        return (latents[:, :3] / 8 + 0.5).movedim(1, -1)


@pytest.fixture(scope="module")
def probed(unet_file):
    """Probing takes a UNet call per layer: once for all tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        found = run(comfy.sd.load_diffusion_model(unet_file), probes=1)
    torch.set_num_threads(threads)
    return found


def test_calibrate_probes_every_layer_and_records_what_it_would_without(model, probed):
    assert probed.sensitivity.keys() == probed.layers.keys() == quantizable_layers(model).keys()
    for name, found in probed.sensitivity.items():
        assert len(found.buckets) == 1 and bool((found.gain >= 0).all()) and bool((found.energy_ratio > 0).all()), name
    plain = run(model).layers
    assert torch.equal(plain[LAYER].range_max, probed.layers[LAYER].range_max), "probing calls are not observed"
    assert torch.equal(plain[LAYER].count, probed.layers[LAYER].count)
    assert hooks_on(model) == 0


def test_plan_predicts_what_compare_measures(model, probed):
    plan = plan_model(model, probed, "optimal", 4, Budget(integer_share=1.0))
    quantized = quantize_model(model, plan.recipe, probed)
    measured = compare_models(model, quantized, PixelVae(), conditioning(1), conditioning(2), latent(), 5, SETTINGS)
    assert measured.integer_share == pytest.approx(1.0) == plan.integer_share
    # Random weights, four steps and one probe; the trained demo model is held to 3 dB (benchmarks/plan_prediction.py).
    assert plan.mean_db == pytest.approx(measured.step_sqnr.mean_db(), abs=4)
    assert plan.frontier and plan.lines()


def test_plan_is_made_of_the_weight_that_would_be_quantized(model, add_lora):
    name = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    plain, beside = (weight_reader(one)(name) for one in (model, add_lora(model)))
    assert torch.equal(plain, beside), "a plain LoRA runs beside the codes and is not in them"
    assert torch.equal(plain, model.model.diffusion_model.get_submodule(name).weight.float())


def test_plan_with_four_bits_fits_a_file_that_int8_does_not(model, probed):
    int8 = plan_model(model, probed, "uniform", 4, Budget(integer_share=1.0))
    plan = plan_model(model, probed, "uniform", 4, Budget(size_bytes=int(0.9 * int8.size_bytes), integer_share=1.0), four_bits=True)
    assert plan.size_bytes <= 0.9 * int8.size_bytes and plan.mean_db < int8.mean_db
    quantized = quantize_model(model, plan.recipe, probed)
    four = [name for name, scheme in plan.recipe.schemes.items() if scheme.is_int4]
    assert four and all(unpack(quantized.model.diffusion_model.get_submodule(name).weight).group_scale is not None for name in four)


def test_plan_refuses_a_quantized_model(model, probed):
    with pytest.raises(ModelError, match="already quantized"):
        plan_model(quantize_model(model, "w8a8-token"), probed, "uniform", 4, Budget())


def test_calibrate_of_the_noisiest_step_takes_one_call_a_run(model):
    calls = []
    handle = model.model.diffusion_model.register_forward_hook(lambda *_: calls.append(1))
    found = run(model, runs=2, mode="noisiest")
    handle.remove()
    assert len(calls) == 2
    assert {tuple(one.buckets.tolist()) for one in found.layers.values()} == {(63,)}


def test_calibrate_progressively_observes_each_step_after_quantized_ones(model):
    calls = []
    handle = model.model.diffusion_model.register_forward_hook(lambda *_: calls.append(1))
    full = run(model).layers[LAYER]
    steps = len(calls)
    found = run(model, mode="progressive").layers[LAYER]
    handle.remove()
    assert len(calls) == 3 * steps
    assert torch.equal(found.count, full.count)
    # Buckets ascend: the last is the first step's, before which nothing was quantized.
    assert torch.equal(found.range_max[-1], full.range_max[-1]) and not torch.equal(found.range_max[0], full.range_max[0])


def test_calibrate_progressively_probes_the_float_model(model):
    probed, plain = run(model, mode="progressive", probes=1), run(model, mode="progressive")
    assert set(probed.sensitivity) == set(probed.layers)
    assert all(torch.equal(probed.layers[name].range_max, plain.layers[name].range_max) for name in plain.layers)


def test_calibrate_by_srm_looks_at_a_quarter_of_the_later_runs(model):
    full, picked = run(model, runs=3).layers[LAYER], run(model, runs=3, mode="srm").layers[LAYER]
    assert picked.buckets.tolist() == full.buckets.tolist()
    assert int(full.count.sum()) == 3 * 4 * int(picked.count.min())
    assert int(picked.count.sum()) == (4 + 1 + 1) * int(picked.count.min())


def test_calibrate_goes_on_where_it_was_cancelled(model, monkeypatch):
    kept = []

    def cancel_in_second_run(_bar, value, *args, **kwargs):
        if value == 6:
            comfy.model_management.interrupt_current_processing()

    with monkeypatch.context() as patch:
        patch.setattr("comfy.utils.ProgressBar.update_absolute", cancel_in_second_run)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(model, runs=3, keep=kept.append)
    assert hooks_on(model) == 0 and len(kept) == 1 and kept[0].summary["runs_done"] == 1
    resumed, whole = run(model, runs=3, start=kept[0]), run(model, runs=3)
    assert resumed.summary == whole.summary
    assert torch.equal(resumed.layers[LAYER].range_max, whole.layers[LAYER].range_max)
    with pytest.raises(CalibrationError, match="has mode 'full', now it is 'srm'"):
        run(model, runs=3, start=kept[0], mode="srm")


def test_calibrate_takes_a_picture_with_a_mask_as_inpainting_does(model):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1.0
    picture = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    settings = SamplerSettings(steps=4, cfg=4.0, sampler_name="euler", scheduler="normal", denoise=0.5)
    found = run(model, settings, given={"samples": picture, "noise_mask": mask})
    plain = run(model, settings, given={"samples": picture})
    assert int(found.layers[LAYER].buckets.max()) < 40
    assert found.summary["masked"] is True and plain.summary["masked"] is False
    assert not torch.equal(found.layers[LAYER].range_max, plain.layers[LAYER].range_max)
