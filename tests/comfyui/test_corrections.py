"""Corrections as a wrapper around a MODEL's UNet: the maths, beside other wrappers and graphs, off unless they helped, refusals."""

from dataclasses import replace

import pytest
import tiny_sdxl
import torch
from comfy.patcher_extension import WrappersMP
from fake_graph import use_fake_graphs

from stepquant.errors import FormatError, ModelError
from stepquant.hosts.comfy.attach import state_of
from stepquant.hosts.comfy.corrections import AUTO, with_corrections
from stepquant.hosts.comfy.scale_lora import reader
from stepquant.quant.corrections.correction_file import Corrections, Verdict
from stepquant.quant.corrections.output import OutputCorrection
from stepquant.quant.tuning.identity import identity

HELPS, DOES_NOT = Verdict(30.0, 30.5, 20.0, 21.0), Verdict(30.0, 30.0, 20.0, 19.0)
HIGH, LOW = 10.0, 0.05  # noise levels of the first and the second half of the schedule


def corrections(model, verdict=HELPS, low=1.0, high=1.0, bias=0.0):
    """Gains of the schedule's two halves."""
    gain = torch.full((64, 4), low)
    gain[32:] = high
    table = OutputCorrection(gain, torch.zeros(64, 4), torch.full((64, 4), bias))
    return Corrections({"ptqd": table}, {"ptqd": verdict}, identity(reader(model), {"name": "tiny"}))


def estimate(model, sigma):
    """The noise that a loaded model sees in a latent, with its wrappers, as its sampler would call it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 8, generator=generator) * sigma
    context = torch.randn(1, 77, tiny_sdxl.CLIP_L + tiny_sdxl.CLIP_G, generator=generator)
    model.patch_model(load_weights=False)
    try:
        model.pre_run()
        options, y = {"wrappers": model.wrappers}, torch.zeros(1, tiny_sdxl.CLIP_G + 1536)
        denoised = model.model.apply_model(x, torch.tensor([sigma]), c_crossattn=context, y=y, transformer_options=options)
    finally:
        model.unpatch_model(unpatch_weights=False)
    return (x - denoised) / sigma


def test_correction_of_the_timestep_is_applied_to_the_noise_estimate(quantized):
    corrected, method = with_corrections(quantized, corrections(quantized, low=0.5, high=1.25), AUTO, "c")
    assert method == "ptqd"
    for sigma, gain in ((LOW, 0.5), (HIGH, 1.25)):
        plain = estimate(quantized, sigma)
        assert torch.allclose(estimate(corrected, sigma), gain * plain, atol=1e-3 * float(plain.abs().max()))


def test_correction_of_the_input_changes_what_the_unet_sees(quantized):
    corrected, _ = with_corrections(quantized, corrections(quantized, bias=0.3), "ptqd", "c")
    assert not torch.allclose(estimate(corrected, HIGH), estimate(quantized, HIGH), atol=1e-3)


def test_correction_that_did_not_help_is_off_unless_it_is_chosen(quantized, sample):
    found = corrections(quantized, DOES_NOT, low=0.9, high=0.9)
    off, method = with_corrections(quantized, found, AUTO, "c")
    assert method is None
    base = sample(quantized)
    assert torch.equal(sample(off), base)
    assert not torch.equal(sample(with_corrections(quantized, found, "ptqd", "c")[0]), base)
    assert torch.equal(sample(quantized), base)


def test_correction_works_beside_another_wrapper_and_around_a_graph(quantized, sample):
    found = corrections(quantized, low=0.9, high=0.9)
    corrected, _ = with_corrections(with_corrections(quantized, found, AUTO, "c")[0], found, AUTO, "c")  # replaces, does not pile up
    seen = []

    def other(executor, *args, **kwargs):
        seen.append(args[0].shape)
        return executor(*args, **kwargs)

    corrected.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "another pack", other)
    expected = sample(corrected, steps=5)
    assert len(seen) == 5
    use_fake_graphs(quantized)
    assert torch.allclose(sample(corrected, steps=5), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert state_of(corrected).runner.replays > 2


def test_corrections_are_refused_in_words_where_they_do_not_belong(model, quantized):
    found = corrections(quantized)
    with pytest.raises(ModelError, match=r"c\.safetensors: corrections are those of a quantized model"):
        with_corrections(model, found, AUTO, "c.safetensors")
    with pytest.raises(FormatError, match="holds no input-bias; it has ptqd"):
        with_corrections(quantized, found, "input-bias", "c.safetensors")
    foreign = replace(found, base={"name": "other-xl", "sample": [0.0] * len(found.base["sample"])})
    with pytest.raises(ModelError, match="made for other-xl"):
        with_corrections(quantized, foreign, AUTO, "c.safetensors")
