"""The quality benchmark's own logic: layers as it builds them, what the judge reads from a prompt, intervals, verdicts."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from stepquant.quant.calibration import Calibration
from stepquant.quant.observer import LayerObserver
from stepquant.quant.scheme import ActivationMode, Scheme
from stepquant.quant.sqnr import sqnr_db
from stepquant.quant.timestep import uniform_groups

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytest.importorskip("diffusers", reason="the benchmark needs diffusers (stepquant[demo])")


def load(name: str):
    """A module of benchmarks/, which is no package."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


class FixedTap:
    bucket = torch.tensor([7, 50])


@pytest.fixture
def linear():
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(64, 32)
    layer.weight.data = torch.randn(32, 64, generator=generator)
    return layer


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 40, 64, generator=generator)
    x[..., 9] *= 30
    return x


@pytest.fixture
def calibration(x):
    observer = LayerObserver(64)
    observer.update(x, [7, 50])
    return Calibration({"layer": observer.statistics()})


GROUPED = Scheme(activation=ActivationMode.CHANNEL_GROUP, channel_groups=8, granularity=8)


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(activation=ActivationMode.STATIC), GROUPED], ids=["token", "static", "grouped"])
def test_simulated_layer_gives_what_integer_codes_give(linear, x, calibration, scheme):
    layers = load("quality_layers")
    plan = layers.LayerPlan(scheme, uniform_groups(8))
    prepared = layers.prepare_layer("layer", linear.weight, plan, calibration, 8, layers.GroupingCache())
    simulated = layers.SimulatedLayer("layer", prepared, linear, FixedTap(), 8)
    real = layers.build_layer("layer", scheme, layers._stored(prepared, linear), linear, FixedTap())
    assert sqnr_db(real(x), simulated(x)) > 90


def test_channel_groups_hold_an_outlier_that_costs_one_scale_its_bits(linear, x, calibration):
    layers = load("quality_layers")
    found = []
    for scheme in (Scheme(activation=ActivationMode.STATIC), GROUPED):
        plan = layers.LayerPlan(scheme, uniform_groups(1))
        prepared = layers.prepare_layer("layer", linear.weight, plan, calibration, 6, layers.GroupingCache())
        found.append(sqnr_db(linear(x), layers.SimulatedLayer("layer", prepared, linear, FixedTap(), 6)(x)))
    assert found[1] - found[0] > 6


def test_per_tensor_weight_has_one_scale(linear, calibration):
    layers = load("quality_layers")
    plan = layers.LayerPlan(Scheme(), per_tensor_weight=True)
    prepared = layers.prepare_layer("layer", linear.weight, plan, calibration, 8, layers.GroupingCache())
    assert prepared.weight_scale.unique().numel() == 1 and int(prepared.codes.abs().max()) == 127


def test_min_max_tables_hold_everything_seen_in_a_group(calibration, x):
    tables = load("quality_layers").min_max_tables(calibration.layers["layer"], uniform_groups(2), True, 8)
    assert float(tables.scale[7] * 127) == pytest.approx(float(x[0].abs().max()), rel=1e-3)
    assert float(tables.scale[50] * 127) == pytest.approx(float(x[1].abs().max()), rel=1e-3)


def test_paired_difference_is_in_points_with_the_interval_of_a_paired_mean():
    reference = torch.tensor([True] * 90 + [False] * 10)
    test = reference.clone()
    test[:2] = False
    found = load("quality_judge").paired_difference(reference, test)
    assert found.mean == pytest.approx(-2.0) and found.low == pytest.approx(-2 - 1.96 * 100 * 0.1407 / 10, abs=0.01)
    assert found.high - found.mean == pytest.approx(found.mean - found.low) and found.count == 100


def record(model: str, mode: str, **figures):
    fixed = dict.fromkeys(("sqnr_worst_db", "latent_sqnr_db", "psnr_db", "adherence_diff", "ci_low", "ci_high", "integer_mac_share"))
    settings = {"prompts": 8, "steps": 20, "guidance": 5.0, "calibration_prompts": 8}
    facts = {"kind": "quality", "model": model, "mode": mode, "size_bytes": 1_000_000, "settings": settings}
    return {**fixed, **facts, "torch": "2", "dtype": "float16", "commit": "abc", "sqnr_db": None, **figures}


def test_table_says_which_musts_are_reached_and_missed():
    table = load("quality_table")
    demo, hard = table.MODELS
    page = table.render(
        [
            record(demo, "fp16"),
            record(demo, "w8a8-min-max", sqnr_db=30.0),
            record(demo, "w8a8-full-static", sqnr_db=39.0),
            record(hard, "w8a8-plan", sqnr_db=40.0, integer_mac_share=0.98, adherence_diff=-0.1, ci_low=-1.0, ci_high=0.8),
            record(hard, "comfy-int8", sqnr_db=44.0),
        ]
    )
    verdicts = page[page.index("What had to be reached") :].splitlines()
    assert "| stepquant-demo-xs | w8a8-full-static: sqnr_db above w8a8-min-max | +3.00 | +9.00 | reached |" in verdicts
    assert "| stepquant-demo-xs-hard | w8a8-plan: sqnr_db above comfy-int8 | -1.00 | -4.00 | **missed** |" in verdicts
    assert sum("reached |" in line for line in verdicts) == 3
    assert "-0.10 [-1.00, +0.80]" in page


def test_last_record_of_a_mode_counts():
    table = load("quality_table")
    page = table.render([record(table.MODELS[0], "w8a8-token", sqnr_db=value) for value in (30.0, 38.0)])
    assert "| w8a8-token | 38.00 |" in page and "30.00" not in page


def test_table_says_how_many_channel_groups_of_what_size_there_are():
    table = load("quality_table")
    groups = {"a": [4, 16], "b": [4, 16], "c": [2, 8]}
    page = table.render([record(table.MODELS[0], "w8a8-full-static", sqnr_db=30.0, channel_groups=groups)])
    assert "2 in 4 of 16" in page and "1 in 2 of 8" in page


@pytest.mark.parametrize("symmetric", [True, False])
def test_simulated_convolution_gives_what_integer_codes_give(symmetric):
    layers, generator = load("quality_layers"), torch.Generator().manual_seed(0)
    conv = torch.nn.Conv2d(32, 16, 3, padding=1)
    conv.weight.data = torch.randn(16, 32, 3, 3, generator=generator)
    x = torch.nn.functional.silu(torch.randn(2, 32, 6, 5, generator=generator))
    scheme = Scheme(symmetric=symmetric)
    prepared = layers.prepare_layer("middle_block.0.in_layers.2", conv.weight, layers.LayerPlan(scheme), None, 8, layers.GroupingCache())
    simulated = layers.SimulatedLayer("middle_block.0.in_layers.2", prepared, conv, FixedTap(), 8)
    real = layers.build_layer("middle_block.0.in_layers.2", scheme, layers._stored(prepared, conv), conv, FixedTap())
    assert sqnr_db(real(x), simulated(x)) > 90


def test_plans_weights_are_rounded_by_the_second_moments_that_they_are_given(linear):
    layers = load("quality_layers")
    moments = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    moments = moments @ moments.t()
    codes = [layers.LayerPlan(Scheme(), moments=one).weight_codes("layer", linear.weight)[0] for one in (None, moments)]
    assert codes[0].shape == codes[1].shape and not torch.equal(*codes)
