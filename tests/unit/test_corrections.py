"""Corrections: what each recovers exactly, verdicts on held-out prompts, the file and its faults, and a UNet that runs with one."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stepquant.errors import CalibrationError, FormatError
from stepquant.quant.calibration import Calibration
from stepquant.quant.corrections.bias import bias_shift
from stepquant.quant.corrections.correction_file import HEADER_KEY, Corrections, Verdict, load_corrections, save_corrections
from stepquant.quant.corrections.output import OutputCorrection, OutputStatistics, identity_correction, spread_visited, with_input_bias
from stepquant.quant.observer import LayerStatistics
from stepquant.quant.sqnr import sqnr_db

BUCKETS = torch.tensor([5, 40])


def _pairs(k=0.1, mean=(0.2, -0.1, 0.0, 0.3), noise=0.01, images=8):
    """Reference estimates, and (1 + k) times them plus a mean per channel plus noise, at two timestep buckets."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(images, 4, 16, 16, generator=generator)
    error = torch.tensor(mean)[:, None, None] + noise * torch.randn(reference.shape, generator=generator)
    return reference, (1 + k) * reference + error, BUCKETS.repeat(images // 2)


def _statistics(*pairs):
    statistics = OutputStatistics()
    statistics.add(*pairs)
    return statistics


def test_ptqd_takes_away_a_proportional_error_and_a_mean():
    reference, estimate, bucket = _pairs()
    correction = _statistics(reference, estimate, bucket).ptqd()
    assert torch.allclose(correction.gain[BUCKETS], torch.full((2, 4), 1 / 1.1), atol=2e-3)
    assert torch.allclose(correction.offset[5], torch.tensor([0.2, -0.1, 0.0, 0.3]), atol=5e-3)
    assert sqnr_db(reference, correction.correct_output(estimate, bucket)) > sqnr_db(reference, estimate) + 10


def test_ptqd_never_makes_estimates_larger():
    correction = _statistics(*_pairs(k=-0.2)).ptqd()
    assert torch.allclose(correction.gain, torch.ones(64, 4))


def test_least_squares_gain_is_the_regression_of_each_channel():
    reference, estimate, bucket = _pairs(mean=(0, 0, 0, 0), noise=0.5)
    correction = _statistics(reference, estimate, bucket).reconstruction(0.0, 0.0, 0.0)
    e, q = (tensor[bucket == 5].transpose(0, 1).flatten(1).double() for tensor in (reference, estimate))
    assert torch.allclose(correction.gain[5], ((e * q).sum(1) / (q * q).sum(1)).float(), atol=1e-5)


def test_reconstruction_corrects_large_values_only_and_is_pulled_to_one():
    reference, estimate, bucket = _pairs(mean=(0, 0, 0, 0))
    statistics = _statistics(reference, estimate, bucket)
    correction = statistics.reconstruction(relative_weight=0.0, pull_to_one=1.0)
    plain = statistics.reconstruction(0.0, 0.0, 0.0)
    assert bool((plain.gain < correction.gain).all()) and bool((correction.gain < 1).all())
    after = correction.correct_output(estimate, bucket)
    small = estimate.abs() <= estimate.abs().mean((2, 3), keepdim=True)
    assert torch.equal(after[small], estimate[small]) and bool((after[~small] != estimate[~small]).all())


def test_correction_uses_the_nearest_visited_bucket_and_the_one_of_each_sample():
    count = torch.zeros(64)
    count[BUCKETS] = 1
    assert spread_visited(count)[[0, 22, 23, 63]].tolist() == [5, 5, 40, 40]
    gain = torch.ones(64, 4)
    gain[40] = 2.0
    correction = OutputCorrection(gain, torch.zeros(64, 4), torch.zeros(64, 4))
    x = torch.ones(2, 4, 2, 2, dtype=torch.float16)
    assert correction.correct_output(x, BUCKETS)[:, 0, 0, 0].tolist() == [1.0, 2.0]
    assert correction.correct_output(x, BUCKETS).dtype is torch.float16


def test_input_bias_is_the_mean_drift_and_leaves_further_channels_alone():
    drift, count = torch.zeros(64, 4), torch.zeros(64)
    drift[5], count[5] = torch.tensor([2.0, 0.0, -4.0, 0.0]), 4
    correction = with_input_bias(identity_correction(), drift, count)
    x = torch.zeros(1, 9, 2, 2)
    corrected = correction.correct_input(x, torch.tensor([5]))
    assert corrected[0, :, 0, 0].tolist() == [-0.5, 0, 1.0, 0, 0, 0, 0, 0, 0]
    assert correction.touches_input and not identity_correction().touches_input


@pytest.mark.parametrize("shape", [pytest.param((6, 20), id="linear"), pytest.param((6, 20, 3, 3), id="conv3x3")])
def test_bias_shift_gives_the_mean_output_back(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    rounded = (weight * 2).round() / 2
    rows = torch.randn(400, 20, generator=generator) + torch.randn(20, generator=generator)

    def mean_output(w):
        return (rows @ (w.sum((2, 3)) if w.ndim == 4 else w).t()).mean(0)

    assert torch.allclose(mean_output(rounded) + bias_shift(weight, rounded, rows), mean_output(weight), atol=1e-4)


def _corrections(**verdicts):
    generator = torch.Generator().manual_seed(1)
    tables = {
        name: OutputCorrection(*(torch.rand(64, 4, generator=generator) for _ in range(3)), mask=0.5 * index)
        for index, name in enumerate(verdicts)
    }
    return Corrections(tables, verdicts, {"name": "base"}, {"steps": 20})


def test_chosen_is_the_best_of_those_that_help_on_held_out_prompts():
    helps, more = Verdict(30.0, 30.2, 20.0, 20.5), Verdict(30.0, 30.0, 20.0, 21.0)
    luck, pays = Verdict(30.0, 30.0, 20.0, 20.05), Verdict(30.0, 28.0, 20.0, 23.0)
    assert [verdict.helps for verdict in (helps, more, luck, pays)] == [True, True, False, False]
    assert _corrections(ptqd=helps, reconstruction=more).chosen() == "reconstruction"
    assert _corrections(ptqd=luck, reconstruction=pays).chosen() is None


def test_correction_file_round_trip(tmp_path):
    corrections, path = (
        _corrections(ptqd=Verdict(1.0, 2.0, 3.0, 4.0), reconstruction=Verdict(1.0, 1.0, 3.0, 3.0)),
        tmp_path / "c.safetensors",
    )
    save_corrections(corrections, path, "0.1.0")
    loaded = load_corrections(path)
    assert loaded.verdicts == corrections.verdicts and loaded.base == {"name": "base"} and loaded.chosen() == "ptqd"
    for name, table in corrections.tables.items():
        assert loaded.tables[name].mask == table.mask
        assert all(torch.equal(getattr(loaded.tables[name], part), getattr(table, part)) for part in ("gain", "offset", "input_bias"))


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        pytest.param({"version": 2}, {}, "newer StepQuant", id="newer"),
        pytest.param({"masks": {"evil": 0}}, {}, "list of methods", id="method"),
        pytest.param({"verdicts": {"ptqd": {"sqnr_before_db": "x"}}}, {}, "a verdict", id="verdict"),
        pytest.param({}, {"ptqd.gain": torch.full((64, 4), torch.nan)}, "tables of ptqd", id="nan"),
        pytest.param({}, {"ptqd.more": torch.zeros(1)}, "not those of its methods", id="tensors"),
    ],
)
def test_correction_file_says_in_one_sentence_what_is_wrong(tmp_path, header, tensors, message):
    path = tmp_path / "c.safetensors"
    save_corrections(_corrections(ptqd=Verdict(1.0, 2.0, 3.0, 4.0)), path, "0.1.0")
    with safe_open(str(path), "pt") as file:
        stored = json.loads(file.metadata()[HEADER_KEY])
    save_file(load_file(path) | tensors, str(path), {HEADER_KEY: json.dumps(stored | header)})
    with pytest.raises(FormatError, match=message) as caught:
        load_corrections(path)
    assert str(path) in str(caught.value)


def test_corrected_unet_runs_the_correction_and_nothing_afterwards(tiny_sdxl_config):
    diffusers = pytest.importorskip("diffusers", reason="the embedded engine needs diffusers (stepquant[demo])")
    from stepquant.hosts.diffusers.corrections import correct_biases, corrected, fit_corrections
    from stepquant.hosts.diffusers.quantize import quantize_unet, quantized_layers, unet_shapes
    from stepquant.hosts.key_mapping import ldm_to_diffusers
    from stepquant.quant.layers import find_layers
    from stepquant.quant.recipe import preset_recipe

    torch.manual_seed(0)
    original = diffusers.UNet2DConditionModel(**tiny_sdxl_config).eval().requires_grad_(False)
    layers = find_layers(unet_shapes(original))
    unet = quantize_unet(copy.deepcopy(original), preset_recipe("w4a8-token", layers))
    conditions = {"text_embeds": torch.ones(1, 16), "time_ids": torch.ones(1, 6)}

    def ask(model):
        return model(torch.ones(1, 4, 8, 8), 500, torch.ones(1, 77, 48), added_cond_kwargs=conditions, return_dict=False)[0]

    before = ask(unet)
    shifted = OutputCorrection(torch.full((64, 4), 2.0), torch.full((64, 4), 0.5), torch.zeros(64, 4))
    with corrected(unet, shifted):
        assert torch.allclose(ask(unet), (before - 0.5) * 2, atol=1e-6)
    biased = OutputCorrection(torch.ones(64, 4), torch.zeros(64, 4), torch.full((64, 4), 0.5))
    with corrected(unet, biased):
        assert not torch.allclose(ask(unet), before, atol=1e-4)
    assert torch.equal(ask(unet), before)
    with pytest.raises(CalibrationError, match="1 in both"):
        fit_corrections(None, unet, ["a"], ["a"], None)

    rows = {name: torch.ones(4, spec.in_channels).half() for name, spec in layers.items()}
    statistics = {name: _statistics_of(one) for name, one in rows.items()}
    name = "middle_block.1.transformer_blocks.0.ff.net.2"
    bias = quantized_layers(unet)[name].bias.clone()
    count = correct_biases(unet, lambda layer: original.get_submodule(ldm_to_diffusers(layer)).weight, Calibration(statistics, {}))
    assert count == sum(layer.bias is not None for layer in quantized_layers(unet).values())
    assert not torch.equal(quantized_layers(unet)[name].bias, bias)


def _statistics_of(rows):
    ones, channels = torch.ones(1), rows.shape[1]
    return LayerStatistics(
        torch.tensor([3]), torch.tensor([4]), -torch.ones(1, channels), torch.ones(1, channels), ones, rows, torch.full((len(rows),), 3)
    )
