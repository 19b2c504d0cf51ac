"""Calibration, recorded trajectories and fidelity figures on the demo model's pipeline, a few steps each."""

import copy
import math

import pytest
import torch

from stepquant.errors import CalibrationError, ModelError

pytest.importorskip("diffusers", reason="the embedded engine needs diffusers (stepquant[demo])")

from stepquant.demo.pipeline import load_demo_pipeline
from stepquant.hosts.diffusers.calibrate import calibrate
from stepquant.hosts.diffusers.fidelity import measure_fidelity, psnr_db, record_reference
from stepquant.hosts.diffusers.peak_memory import peak_activation_bytes
from stepquant.hosts.diffusers.quantize import quantize_unet, unet_shapes
from stepquant.hosts.diffusers.trajectory import Sampling, record_trajectory, sample_latents
from stepquant.quant.layers import find_layers
from stepquant.quant.recipe import preset_recipe

PROMPTS = ("3d render of a teddy bear", "flat icon of a cactus, pink background")
QUICK = Sampling(steps=2, guidance=4.0, seed=3)


@pytest.fixture(scope="module")
def pipeline():
    return load_demo_pipeline()


def hooks_of(unet):
    return [name for name, module in unet.named_modules() if module._forward_pre_hooks or module._forward_hooks]


def test_calibrate_observes_every_quantizable_layer_in_the_visited_buckets(pipeline):
    calibration = calibrate(pipeline, PROMPTS[:1], QUICK)
    layers = find_layers(unet_shapes(pipeline.unet))
    assert calibration.layers.keys() == layers.keys()
    # Two Euler steps with leading spacing visit t = 501 and t = 1.
    for name, statistics in calibration.layers.items():
        assert statistics.buckets.tolist() == [0, 32], name
        assert statistics.range_min.shape == (2, layers[name].in_channels)
    assert calibration.summary["prompts"] == [PROMPTS[0]] and calibration.summary["steps"] == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_calibrate_leaves_nothing_behind_when_cancelled(pipeline, error):
    def cancel(done, total):
        assert hooks_of(pipeline.unet)
        raise error

    with pytest.raises(error):
        calibrate(pipeline, PROMPTS, QUICK, progress=cancel)
    assert not hooks_of(pipeline.unet)


def test_calibrate_of_the_noisiest_step_stops_there(pipeline):
    calls = []
    calibration = calibrate(pipeline, PROMPTS[:1], QUICK, progress=lambda done, total: calls.append((done, total)), mode="noisiest")
    assert {tuple(statistics.buckets.tolist()) for statistics in calibration.layers.values()} == {(32,)}
    assert calls[-1] == (2, 2) and calibration.summary["mode"] == "noisiest"


def test_calibrate_progressively_observes_each_step_after_quantized_ones(pipeline):
    calls = []
    handle = pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    full, progressive = (calibrate(pipeline, PROMPTS[:1], QUICK, mode=mode) for mode in ("full", "progressive"))
    handle.remove()
    assert len(calls) == 2 + 2 * 2 and not hooks_of(pipeline.unet)
    assert progressive.summary["mode"] == "progressive"
    layer = "middle_block.0.in_layers.2"
    before, after = full.layers[layer], progressive.layers[layer]
    assert torch.equal(before.count, after.count) and before.buckets.tolist() == after.buckets.tolist() == [0, 32]
    # The first step (bucket 32) has nothing quantized before it; what the second sees has moved, a little.
    assert torch.equal(before.range_max[1], after.range_max[1]) and not torch.equal(before.range_max[0], after.range_max[0])
    torch.testing.assert_close(before.range_max[0], after.range_max[0], rtol=0.2, atol=0.1)


def test_calibrate_goes_on_where_it_was_cancelled(pipeline):
    kept = []

    def cancel(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(pipeline, PROMPTS, QUICK, batch_size=1, progress=cancel, keep=kept.append)
    assert len(kept) == 1 and kept[0].summary["runs_done"] == 1
    resumed = calibrate(pipeline, PROMPTS, QUICK, batch_size=1, start=kept[0])
    whole = calibrate(pipeline, PROMPTS, QUICK, batch_size=1)
    assert resumed.summary == whole.summary
    name = "middle_block.0.in_layers.2"
    assert torch.equal(resumed.layers[name].range_max, whole.layers[name].range_max)
    with pytest.raises(CalibrationError, match="has seed 3, now it is 4"):
        calibrate(pipeline, PROMPTS, Sampling(2, 4.0, 4), batch_size=1, start=kept[0])


def test_calibrate_refuses_no_prompts_and_quantized_models(pipeline):
    with pytest.raises(CalibrationError, match="no prompts"):
        calibrate(pipeline, [])
    quantized = copy.copy(pipeline)
    quantized.unet = quantize_unet(copy.deepcopy(pipeline.unet), preset_recipe("w8a8-token", find_layers(unet_shapes(pipeline.unet))))
    with pytest.raises(ModelError, match="already quantized"):
        calibrate(quantized, PROMPTS, QUICK)


def test_latents_of_a_prompt_do_not_depend_on_its_batch(pipeline):
    together = sample_latents(pipeline, PROMPTS, Sampling(steps=1), batch_size=2)
    apart = sample_latents(pipeline, PROMPTS, Sampling(steps=1), batch_size=1)
    assert torch.allclose(together, apart, atol=1e-3)


def test_record_trajectory_counts_steps_anew_in_every_batch(pipeline):
    seen = []
    trajectory = record_trajectory(pipeline, PROMPTS, QUICK, batch_size=1, progress=lambda done, total: seen.append((done, total)))
    assert [call.step for call in trajectory.calls] == [0, 1, 0, 1]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert trajectory.latents.shape == (2, 4, 32, 32)
    assert not hooks_of(pipeline.unet)


def test_fidelity_of_the_same_unet_is_exact(pipeline):
    reference = record_reference(pipeline, PROMPTS[:1], Sampling(steps=1))
    fidelity = measure_fidelity(pipeline, pipeline.unet, reference)
    assert fidelity.sqnr_db == fidelity.latent_sqnr_db == fidelity.mean_psnr_db == math.inf


def test_fidelity_of_a_quantized_unet_and_the_pipeline_keeps_its_own(pipeline):
    reference = record_reference(pipeline, PROMPTS[:1], QUICK)
    recipe = preset_recipe("w8a8-token", find_layers(unet_shapes(pipeline.unet)))
    original = pipeline.unet
    quantized = quantize_unet(copy.deepcopy(original), recipe)
    fidelity = measure_fidelity(pipeline, quantized, reference)
    assert pipeline.unet is original
    assert len(fidelity.step_sqnr_db) == 2 and fidelity.sqnr_worst_db == min(fidelity.step_sqnr_db)
    assert 20 < fidelity.sqnr_worst_db <= fidelity.sqnr_db < 60
    assert fidelity.integer_share == 1.0
    assert fidelity.pictures.shape == (1, 3, 256, 256)


def test_psnr_counts_eight_bit_levels():
    reference = torch.full((2, 3, 4, 4), 100 / 255)
    test = reference.clone()
    test[0] += 0.3 / 255  # the same level
    test[1] += 1 / 255
    assert psnr_db(reference, test) == (math.inf, pytest.approx(20 * math.log10(255)))


def test_peak_activation_bytes_counts_what_lives_at_once():
    def call():
        first = torch.zeros(1000)  # 4000 bytes
        second = first + 1  # 8000 with the first
        del first
        return second.view(10, 100) * 2  # 8000 with the second

    assert peak_activation_bytes(call, torch.device("cpu")) == 8000
