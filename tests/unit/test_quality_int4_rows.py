"""The quality table's 4-bit rows: each format's arithmetic and size, and that ours runs exactly what a file would hold."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from stepquant.errors import CalibrationError
from stepquant.quant.int4 import quantize_int4
from stepquant.quant.layer_noise import stored_bytes
from stepquant.quant.layers import LayerSpec
from stepquant.quant.scheme import Scheme

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytest.importorskip("diffusers", reason="the benchmark needs diffusers (stepquant[demo])")
LAYER = "middle_block.1.transformer_blocks.0.attn1.to_q"
SPECS = {LAYER: LayerSpec(LAYER, (64, 128)), "middle_block.0.in_layers.2": LayerSpec("middle_block.0.in_layers.2", (32, 64, 3, 3))}


@pytest.fixture
def rows():
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module("quality_int4_rows")


def _weight(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _dequantized(plan, name, weight):
    codes, scale = plan.weight_codes(name, weight)
    values = codes.float() * scale.view(-1, *[1] * (codes.ndim - 1))
    return values.permute(0, 3, 1, 2) if values.ndim == 4 else values


def test_gguf_q4_0_and_q8_0_worked_examples(rows):
    block = torch.tensor([[-8.0, 7.0, 0.4, -0.6, *[0.0] * 28]])
    assert rows._q4_0(block)[0, :4].tolist() == [-8, 7, 0, -1]
    assert rows._q4_0(-block)[0, :4].tolist() == [8, -7, 0, 1]  # the largest value gets code -8, whichever sign it has
    assert rows._q8_0(torch.tensor([[127.0, -127.0, 0.4, 0.6, *[0.0] * 28]]))[0, :4].tolist() == [127, -127, 0, 1]
    assert not rows._q4_0(torch.zeros(1, 32)).any()


@pytest.mark.parametrize(("mode", "bits", "worst"), [("gguf-q4_0", 4.5, 0.3), ("gguf-q8_0", 8.5, 0.02)])
def test_gguf_rows_round_every_layer_in_floats_and_count_their_own_size(rows, mode, bits, worst):
    plans = rows.int4_plans(mode, SPECS, dict)
    for name, spec in SPECS.items():
        weight = _weight(*spec.shape)
        assert plans[name].simulated and plans[name].stored_bytes(spec) == weight.numel() * bits / 8
        assert 0 < float((_dequantized(plans[name], name, weight) - weight).abs().max()) < worst


def test_our_rows_run_exactly_what_a_file_holds(rows):
    plans, weight = rows.int4_plans("w4a8-plain", SPECS, dict), _weight(64, 128)
    assert torch.allclose(_dequantized(plans[LAYER], LAYER, weight), quantize_int4(weight, LAYER).dequantize(), rtol=1e-6)
    assert plans[LAYER].stored_bytes(SPECS[LAYER]) == stored_bytes(SPECS[LAYER], Scheme(weight_bits=4))
    assert not plans[LAYER].simulated


def test_dgq_row_is_rounded_to_nearest_between_each_channels_extremes(rows):
    grouped = {name: rows.LayerPlan(Scheme()) for name in SPECS}
    plans, weight = rows.int4_plans(rows.DGQ, SPECS, lambda: grouped), _weight(64, 128)
    step = (weight.amax(1) - weight.amin(1)) / 15
    error = (_dequantized(plans[LAYER], LAYER, weight) - weight).abs().amax(1)
    assert bool((error <= 1.01 * step).all()) and bool((error > 0.3 * step).all())
    conv = _weight(32, 64, 3, 3)
    assert float((_dequantized(plans["middle_block.0.in_layers.2"], "conv", conv) - conv).abs().max()) < 0.02


def test_rounded_rows_say_what_they_lack(rows, monkeypatch):
    monkeypatch.delenv(rows.FOLDER_VARIABLE, raising=False)
    with pytest.raises(CalibrationError, match="STEPQUANT_ROUNDED is not set"):
        rows.int4_plans("w4a8-gptq", SPECS, dict)


def test_prompts_rounded_on_are_not_among_those_measured_or_judged(rows):
    from stepquant.demo.prompts import heldout_prompts, seen_prompts

    found = rows.rounding_prompts()
    assert len(set(found)) == 40 and not set(found) & {*seen_prompts(512), *heldout_prompts(512)}
    assert len({prompt.rpartition(", ")[2] for prompt in found}) > 6  # of many backgrounds


def test_time_of_rounding_is_one_record_with_what_was_timed(rows, monkeypatch, tmp_path):
    timing = importlib.import_module("rounding_time")
    given = []
    monkeypatch.setattr(timing, "reconstruct", lambda *args, **_: given.append(args))
    monkeypatch.setattr(sys, "argv", ["rounding_time.py", "--threads", "1", "--iterations", "7", "--out", str(tmp_path)])
    timing.main()
    record = json.loads((tmp_path / "rounding_time.jsonl").read_text(encoding="utf-8"))
    assert record["kind"] == "rounding_time" and record["seconds"] >= 0
    assert record["settings"]["blocks"] == 17 and record["settings"]["iterations"] == given[0][4].training.iterations == 7
    assert str(tmp_path) not in record["command"]
