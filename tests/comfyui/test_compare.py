"""Comparison of two live MODELs: the figures are right, and both are left as they were."""

import math

import comfy.model_management
import pytest
import torch
from sampling_run import conditioning

from stepquant.errors import ModelError
from stepquant.hosts.comfy.compare import compare_models, psnr_db
from stepquant.hosts.comfy.quantize import quantize_model
from stepquant.hosts.comfy.sampling import SamplerSettings, sample_latent
from stepquant.quant.sqnr import sqnr_db


class PixelVae:
    """Decodes by looking at the first three channels: (B, 4, h, w) to (B, h, w, 3)."""

    def decode(self, latents):
        return (latents[:, :3] / 8 + 0.5).movedim(1, -1)


def settings(sampler: str = "euler", steps: int = 3) -> SamplerSettings:
    return SamplerSettings(steps=steps, cfg=4.0, sampler_name=sampler, scheduler="normal")


LATENT = {"samples": torch.zeros(1, 4, 16, 16)}


def compare(original, quantized, sampling=None, runs=1, positive=None, latent=LATENT):
    return compare_models(
        original, quantized, PixelVae(), positive or conditioning(1), conditioning(2), latent, 5, sampling or settings(), runs
    )


@pytest.fixture
def quantized(model):
    return quantize_model(model, "w8a8-token")


def test_compare_finds_no_difference_between_a_model_and_itself(model):
    result = compare(model, model)
    assert result.step_sqnr.per_step_db() == [math.inf] * 3
    assert result.latent_sqnr_db == math.inf and result.psnr_db == [math.inf]
    assert result.integer_share is None
    assert "equal" in result.lines()[0]


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m", "heun"])
def test_compare_replays_the_originals_trajectory(model, quantized, sampler):
    """The figure of each step is the SQNR of outputs for the same input: here taken apart by hand, with plain hooks."""
    result = compare(model, quantized, settings(sampler))
    inputs, references = [], []

    def record(_unet, args, kwargs, output):
        inputs.append((args, kwargs))
        references.append(output.clone())

    handle = model.model.diffusion_model.register_forward_hook(record, with_kwargs=True)
    sample_latent(model, conditioning(1), conditioning(2), LATENT, 5, settings(sampler))
    handle.remove()
    comfy.model_management.load_models_gpu([quantized])
    tests = [quantized.model.diffusion_model(*args, **kwargs) for args, kwargs in inputs]
    assert len(result.step_sqnr.per_step_db()) == 3
    if len(tests) == 3:  # heun calls the model twice in most steps
        by_hand = [sqnr_db(reference, test) for reference, test in zip(references, tests, strict=True)]
        assert result.step_sqnr.per_step_db() == pytest.approx(by_hand, abs=1e-3)


def test_compare_makes_the_pictures_that_sampling_makes(model, quantized):
    result = compare(model, quantized, runs=2)
    for index, seed in enumerate((5, 6)):
        for one, pictures in ((model, result.original), (quantized, result.quantized)):
            latent = sample_latent(one, conditioning(1), conditioning(2), LATENT, seed, settings())
            assert torch.equal(PixelVae().decode(latent).clamp(0, 1)[0].float(), pictures[index])
    assert result.seeds == [5, 6] and len(result.psnr_db) == 2


def test_compare_names_the_seed_of_each_picture_of_a_batch(model, quantized):
    result = compare(model, quantized, settings(steps=1), runs=2, latent={"samples": torch.zeros(2, 4, 16, 16)})
    assert result.seeds == [5, 5, 6, 6] and len(result.original) == 4


def test_compare_counts_integer_multiply_adds(model, quantized):
    assert compare(model, quantized).integer_share > 0.98


def test_compare_takes_regional_prompts(model, quantized):
    """Two positive conditionings: ComfyUI batches them or not, as memory allows."""
    positive = conditioning(1) + conditioning(3)
    assert math.isfinite(compare(model, quantized, positive=positive).step_sqnr.mean_db())


def test_compare_matches_steps_when_one_model_is_called_without_batching(model, quantized, monkeypatch):
    expected = compare(model, quantized).step_sqnr.per_step_db()
    fits = type(model.model).memory_required
    # ComfyUI batches prompt and negative prompt if both fit: let them not fit for the original.
    monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: fits(model.model, *args, **kwargs) + 1e18)
    apart = compare(model, quantized).step_sqnr.per_step_db()
    assert apart == pytest.approx(expected, abs=1.0)  # rounding of int8 inputs differs a little with the batch


def test_compare_leaves_both_models_as_they_were(model, quantized, sample):
    before = [sample(one) for one in (model, quantized)]
    compare(model, quantized)
    assert all(not one.wrappers.get("diffusion_model") for one in (model, quantized))
    assert all(getattr(module, "counter", None) is None for module in quantized.model.modules())
    for one, expected in zip((model, quantized), before, strict=True):
        assert torch.equal(sample(one), expected)


def test_compare_refuses_models_that_are_called_differently(model, quantized):
    other = quantized.clone()
    # Without guidance ComfyUI leaves the negative prompt out: one call a step has fewer conditionings.
    other.set_model_sampler_cfg_function(lambda arguments: arguments["cond"], disable_cfg1_optimization=False)
    sampling = SamplerSettings(steps=2, cfg=1.0, sampler_name="euler", scheduler="normal")
    original = model.clone()
    original.set_model_sampler_cfg_function(lambda arguments: arguments["cond"], disable_cfg1_optimization=True)
    with pytest.raises(ModelError, match=r"called differently.*same LoRAs"):
        compare(original, other, sampling)


@pytest.mark.parametrize(("error", "expected"), [(0.0, math.inf), (0.1, 20.0), (0.01, 40.0)])
def test_psnr_db_of_a_constant_error(error, expected):
    reference = torch.full((8, 8, 3), 0.5, dtype=torch.float64)
    assert psnr_db(reference, reference + error) == pytest.approx(expected)
