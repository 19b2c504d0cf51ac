"""Plan in real ComfyUI graphs: its pictures, and a recipe that Quantize follows."""

from __future__ import annotations

import re

import pytest
import torch

from stepquant.quant.calibration import Calibration
from stepquant.quant.sensitivity import LayerSensitivity

from . import workflows as w


@pytest.fixture(scope="module")
def calibration(graphs) -> dict:
    """Loads a calibration of the demo model with made-up sensitivities: measuring them takes minutes on a CPU."""
    graphs.outputs(w.stock_parts() | w.calibrate(file_name="for_plan"))
    file = graphs.base / "models" / "stepquant_calibrations" / "for_plan.safetensors"
    found = Calibration.load(file)
    found.sensitivity = {name: LayerSensitivity(torch.tensor([30]), torch.tensor([0.01]), torch.tensor([1.0])) for name in found.layers}
    found.save(file)
    return {"calibration": w.node("StepQuantLoadCalibration", file_name="for_plan.safetensors")}


def plan(**inputs: object) -> dict:
    given = {"integer_share": 98.0, "max_size_mb": 0.0, "min_sqnr_db": 0.0, "grouping": "optimal", "timestep_groups": 2, **inputs}
    given = {"max_vram_mb": 0.0, "protect": "", **given}
    return {"plan": w.node("StepQuantPlan", model=["load", 0], calibration=["calibration", 0], **given)}


def test_plan_draws_its_pictures_and_quantize_follows_its_recipe(graphs, calibration):
    quantize = w.quantize(calibration=["calibration", 0], recipe=["plan", 0])
    outputs = graphs.outputs(w.stock_parts() | calibration | plan(protect="middle_block.1.proj_in\n") | quantize | w.sample())
    report = outputs["plan"]["text"][0]
    assert "middle_block.1.proj_in" in report
    assert float(re.search(r"integer multiply-adds: ([\d.]+) %", report)[1]) >= 98
    assert len(outputs["plan"]["images"]) == 4
    kept = int(re.search(r"(\d+) fp16", report)[1])
    assert f"plan: {257 - kept} layers in int8" in outputs["quantize"]["text"][0]


def test_plan_says_what_would_fit(graphs, calibration):
    sentence = graphs.failure(w.stock_parts() | calibration | plan(max_size_mb=1.0, grouping="uniform"))
    assert "the smallest file is 14." in sentence


def test_plan_asks_for_sensitivity(graphs):
    parts = w.stock_parts() | {"calibration": w.calibrate(seed=5)["calibrate"]} | plan(grouping="uniform")
    assert "its sensitivity was not measured" in graphs.failure(parts)


def test_quantize_asks_for_the_calibration_of_a_plan(graphs, calibration):
    parts = w.stock_parts() | calibration | plan(min_sqnr_db=20.0, grouping="uniform") | w.quantize(recipe=["plan", 0]) | w.sample()
    assert "the plan: no calibration is connected" in graphs.failure(parts)
