"""Every node run in real ComfyUI graphs, with the command line's extras hidden (see graph_runner.BLOCKED)."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from . import workflows as w


def picture(graphs, outputs: dict, node: str = "picture", index: int = 0) -> np.ndarray:
    image = outputs[node]["images"][index]
    return np.asarray(Image.open(graphs.base / image["type"] / image["subfolder"] / image["filename"]))


def text(outputs: dict, node: str) -> str:
    return outputs[node]["text"][0]


def test_quantize_makes_a_picture_like_the_originals(graphs):
    outputs = graphs.outputs(w.stock_parts() | w.quantize() | w.sample())
    original = graphs.outputs(w.stock_parts() | w.sample(model="load", prefix="original"))
    assert "257 layers in int8" in text(outputs, "quantize")
    ours, theirs = (picture(graphs, one).astype(float).ravel() for one in (outputs, original))
    # Three steps make a rough picture, which exaggerates differences: test_compare holds the SQNR.
    assert 0.7 < np.corrcoef(ours, theirs)[0, 1] < 1 - 1e-9


def test_quantize_leaves_the_incoming_model_usable(graphs):
    before = graphs.outputs(w.stock_parts() | w.sample(model="load", prefix="before"))
    graphs.outputs(w.stock_parts() | w.quantize() | w.sample())
    after = graphs.outputs(w.stock_parts() | w.sample(model="load", prefix="after"))
    assert np.array_equal(picture(graphs, before), picture(graphs, after))


def test_quantize_asks_for_a_calibration_when_static(graphs):
    sentence = graphs.failure(w.stock_parts() | w.quantize("w8a8-static") | w.sample())
    assert "no calibration is connected" in sentence and "choose w8a8-token" in sentence


def test_quantize_refuses_a_model_that_is_quantized_already(graphs):
    twice = w.quantize() | {"again": w.node("StepQuantQuantize", model=["quantize", 0], preset="w8a8-token", timestep_groups=8)}
    sentence = graphs.failure(w.stock_parts() | twice | w.sample(model="again"))
    assert "already quantized" in sentence


def test_quantize_leaves_nothing_behind_when_cancelled(graphs):
    # Another value of timestep_groups, so that ComfyUI's cache does not answer.
    graph = w.stock_parts() | w.quantize() | w.sample()
    graph["quantize"]["inputs"]["timestep_groups"] = 3
    answer = graphs.run(graph, cancel_after=1)
    assert not answer["success"] and answer["failure"]["node_type"] == "StepQuantQuantize"
    assert graphs.outputs(graph), "the same graph runs afterwards"


def test_calibrate_feeds_static_quantization(graphs):
    parts = w.stock_parts() | w.calibrate(runs=1) | w.quantize("w8a8-static", calibration=["calibrate", 0])
    outputs = graphs.outputs(parts | w.sample())
    assert text(outputs, "calibrate") == f"257 layers observed in {w.STEPS} of 64 timestep buckets"
    assert "static scales in 8 timestep groups" in text(outputs, "quantize")


def test_calibrate_saves_a_file_that_load_calibration_opens(graphs):
    graphs.outputs(w.stock_parts() | w.calibrate(file_name="sub/demo"))
    assert (graphs.base / "models" / "stepquant_calibrations" / "sub" / "demo.safetensors").is_file()
    opened = {"calibrate": w.node("StepQuantLoadCalibration", file_name="sub/demo.safetensors")}
    outputs = graphs.outputs(w.stock_parts() | opened | w.quantize("w8a8-static", calibration=["calibrate", 0]) | w.sample())
    assert "257 layers observed" in text(outputs, "calibrate")


def test_calibrate_adds_to_an_earlier_calibration(graphs):
    first = w.calibrate(seed=1)
    second = {"second": w.calibrate(seed=2, denoise=0.5, add_to=["calibrate", 0])["calibrate"]}
    outputs = graphs.outputs(w.stock_parts() | first | second)
    assert text(outputs, "calibrate") == f"257 layers observed in {w.STEPS} of 64 timestep buckets"
    buckets = int(re.search(r"observed in (\d+) of 64", text(outputs, "second"))[1])
    assert w.STEPS < buckets <= 2 * w.STEPS


def test_calibrate_leaves_nothing_behind_when_cancelled(graphs):
    answer = graphs.run(w.stock_parts() | w.calibrate(seed=99, file_name="cancelled"), cancel_after=2)
    assert not answer["success"] and answer["failure"]["node_type"] == "StepQuantCalibrate"
    assert answer["hooks_left"] == 0
    assert not list(graphs.base.rglob("*cancelled*"))


def test_calibrate_goes_on_where_it_was_cancelled(graphs):
    given = {"runs": 2, "seed": 97, "file_name": "unfinished"}
    answer = graphs.run(w.stock_parts() | w.calibrate(**given), cancel_after=w.STEPS + 1)
    assert not answer["success"] and answer["hooks_left"] == 0
    saved = {"calibrate": w.node("StepQuantLoadCalibration", file_name="unfinished.safetensors")}
    assert "unfinished: 1 of 2 runs" in text(
        graphs.outputs(w.stock_parts() | saved | {"show": w.node("PreviewAny", source=["calibrate", 0])}), "calibrate"
    )
    outputs = graphs.outputs(w.stock_parts() | w.calibrate(**given, resume=True))
    assert "saved as unfinished.safetensors" in text(outputs, "calibrate") and "unfinished: " not in text(outputs, "calibrate")


def test_calibrate_checks_the_file_name_before_the_long_run(graphs):
    answer = graphs.run(w.stock_parts() | w.calibrate(seed=98, file_name="../outside"))
    assert "not a usable name" in answer["failure"]["exception_message"]
    assert answer["progress_reports"] == 0


def test_load_calibration_names_a_file_that_is_not_there(graphs):
    graph = {"calibrate": w.node("StepQuantLoadCalibration", file_name="nowhere.safetensors")}
    graph = w.stock_parts() | graph | w.quantize("w8a8-static", calibration=["calibrate", 0]) | w.sample()
    answer = graphs.run(graph)
    assert not answer["valid"]
    assert "nowhere.safetensors: not in models/stepquant_calibrations" in str(answer["node_errors"])


def test_load_calibration_refuses_another_kind_of_file(graphs):
    folder = graphs.base / "models" / "stepquant_calibrations"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").symlink_to(graphs.base / "models" / "checkpoints" / "demo.safetensors")
    graph = {"calibrate": w.node("StepQuantLoadCalibration", file_name="model.safetensors")}
    sentence = graphs.failure(w.stock_parts() | graph | w.quantize("w8a8-static", calibration=["calibrate", 0]) | w.sample())
    assert "this is not a StepQuant calibration" in sentence


def test_compare_shows_a_grid_a_plot_and_the_figures(graphs):
    outputs = graphs.outputs(w.stock_parts() | w.quantize() | w.compare(runs=2))
    report = text(outputs, "compare")
    for figure in ("UNet output SQNR: mean", "Final latent SQNR", "Picture PSNR", "Time per step", "ran as integers: 100.0 %"):
        assert figure in report
    assert float(re.search(r"UNet output SQNR: mean ([\d.]+) dB", report)[1]) > 25
    grid, plot = (picture(graphs, outputs, "compare", index) for index in (0, 1))
    assert grid.shape[0] > 2 * 192 and grid.shape[1] > 3 * 192
    assert plot.shape == (480, 960, 3)


def test_compare_hands_its_pictures_on(graphs):
    graph = w.stock_parts() | w.quantize() | w.compare(runs=2)
    for output, name in enumerate(("grid", "plot", "original", "quantized")):
        graph[name] = w.node("PreviewImage", images=["compare", output])
    graph["report"] = w.node("PreviewAny", source=["compare", 4])
    outputs = graphs.outputs(graph)
    assert len(outputs["original"]["images"]) == len(outputs["quantized"]["images"]) == 2
    assert picture(graphs, outputs, "quantized").shape == (w.SIDE, w.SIDE, 3)
    assert "SQNR" in text(outputs, "report")


def test_compare_leaves_nothing_behind_when_cancelled(graphs):
    graph = w.stock_parts() | w.quantize() | w.compare(seed=55)
    graphs.outputs(w.stock_parts() | w.quantize() | w.sample())
    answer = graphs.run(graph, cancel_after=w.STEPS + 1)
    assert not answer["success"] and answer["hooks_left"] == 0
    assert graphs.outputs(graph)


def test_system_check_says_what_runs_here(graphs):
    report = text(graphs.outputs({"check": w.node("StepQuantSystemCheck")}), "check")
    assert report.startswith("CPU: plain torch")
    for part in ("StepQuant", "ComfyUI", "torch", "Triton", "Python"):
        assert part in report
    assert str(graphs.base) not in report, "the text goes into public bug reports: no paths"


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        ({"preset": "w2a2"}, "value_not_in_list"),
        ({"timestep_groups": 0}, "value_smaller_than_min"),
        ({"timestep_groups": 65}, "bigger_than_max"),
    ],
)
def test_quantize_refuses_values_outside_its_ranges(graphs, inputs, complaint):
    graph = w.stock_parts() | w.quantize() | w.sample()
    graph["quantize"]["inputs"].update(inputs)
    answer = graphs.run(graph)
    assert not answer["valid"] and complaint in str(answer["node_errors"])
