"""The quality benchmark's own logic: layers as it builds them, what the judge reads from a prompt, intervals, verdicts."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stepquant.quant.calibration import Calibration
from stepquant.quant.layers import LayerSpec
from stepquant.quant.observer import LayerObserver
from stepquant.quant.recipe import Recipe
from stepquant.quant.scheme import TOKEN16, ActivationMode, Scheme
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


STATIC_SCHEME = Scheme(activation=ActivationMode.STATIC)


@pytest.mark.parametrize("scheme", [Scheme(), STATIC_SCHEME, GROUPED, TOKEN16], ids=["token", "static", "grouped", "token16"])
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


def test_table_judges_plans_with_a_floor_and_shows_what_is_done_twice():
    table = load("quality_table")
    demo = table.MODELS[0]
    plan = record(demo, "w8a8-plan-51", sqnr_db=49.5, integer_mac_share=0.99, ci_low=-1.0, ci_high=1.0, wide_mac_share=0.36)
    page = table.render([record(demo, "comfy-int8", sqnr_db=50.0), plan | {"adherence_diff": 0.0}])
    assert "| 99.0 %, 36.0 % twice |" in page
    assert "| stepquant-demo-xs | w8a8-plan-51: sqnr_db above comfy-int8 | -1.00 | -0.50 | reached |" in page
    assert page.count("w8a8-plan-51: ") == 3 and "**missed**" not in page


def test_rows_stand_in_the_tables_order():
    table = load("quality_table")
    modes = ["w4a8-plain", "w8a8-token", "comfy-int8", "w8a6-min-max", "fp16"]
    page = table.render([record(table.MODELS[0], mode, sqnr_db=30.0) for mode in modes])
    found = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert [mode for mode in found if mode in modes] == ["fp16", "comfy-int8", "w8a8-token", "w4a8-plain", "w8a6-min-max"]


def test_last_record_of_a_mode_counts():
    table = load("quality_table")
    page = table.render([record(table.MODELS[0], "w8a8-token", sqnr_db=value) for value in (30.0, 38.0)])
    assert "| w8a8-token | 38.00 |" in page and "30.00" not in page


def test_table_marks_a_run_with_changes_that_its_commit_does_not_hold():
    table = load("quality_table")
    commits = {"a": "0123456789", "b": "01234567-dirty"}
    rows = [record(table.MODELS[0], mode, sqnr_db=30.0) | {"commit": commit} for mode, commit in commits.items()]
    cells = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in table.render(rows).splitlines() if line.startswith("| ")}
    assert cells["a"].endswith(" 0123456") and cells["b"].endswith(" 0123456+")


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


PLANNED = {"plan": Scheme(), "plan-floor": TOKEN16}


def test_plan_with_a_floor_is_a_row_of_its_own():
    rows = load("quality_rows")
    specs = {name: LayerSpec(name, (8, 8)) for name in ("middle_block.1.proj_in", "middle_block.1.proj_out")}
    recipes = {mode: Recipe({name: scheme}, mode, "") for (mode, scheme), name in zip(PLANNED.items(), specs, strict=True)}
    built = [rows.build_row(mode, 8, specs, None, recipes.get, {}, None, dict) for mode in PLANNED]
    assert [row.mode for row in built] == ["w8a8-plan", "w8a8-plan-floor"]
    assert [next(iter(row.plans.values())).scheme for row in built] == list(PLANNED.values())


def test_plans_weights_are_rounded_by_the_second_moments_that_they_are_given(linear):
    layers = load("quality_layers")
    moments = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    moments = moments @ moments.t()
    codes = [layers.LayerPlan(Scheme(), moments=one).weight_codes("layer", linear.weight)[0] for one in (None, moments)]
    assert codes[0].shape == codes[1].shape and not torch.equal(*codes)


def test_verdicts_on_fp16s_pictures_are_judged_once_and_shared(tmp_path):
    quality = load("quality")
    bench, judged = object.__new__(quality.Bench), []
    bench.args = SimpleNamespace(verdicts=tmp_path / "right.safetensors")
    bench._judged = lambda judge, title: judged.append(title) or torch.tensor([True, False])
    found = [bench._verdicts(None) for _ in range(2)]
    assert judged == ["fp16"] and torch.equal(*found)
    bench.args = SimpleNamespace(verdicts=None)
    bench._verdicts(None)
    assert len(judged) == 2


def test_settings_replace_the_sampler_for_their_time_and_clip_no_latents():
    from diffusers import EulerDiscreteScheduler

    general = load("quality_general")
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading")
    pipeline = SimpleNamespace(scheduler=scheduler, default_sample_size=32)
    for setting in general.SETTINGS:
        with general.applied(pipeline, setting):
            assert pipeline.default_sample_size == setting.side
            # A prediction clipped to [-1, 1] halves the spread of latents: that is no sampler anyone uses.
            assert not pipeline.scheduler.config.get("clip_sample", False), setting.name
            assert pipeline.scheduler.config.timestep_spacing == "leading"
    assert pipeline.scheduler is scheduler
