"""A ComfyUI that is killed in the middle of work: no half-written file, and what was saved before opens afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from . import workflows as w
from .conftest import make_base
from .graph_process import GraphProcess
from .test_nodes import picture, text

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
STATIC = {"calibration": ["calibrate", 0]}
# What runs when the process dies, and after how many progress reports: a run of the sampler reports each step, the rest each layer.
WORK = {
    "calibrate": (w.stock_parts() | w.calibrate(runs=8, file_name="killed"), 2),
    "quantize": (w.stock_parts() | w.quantize("w8a8-static", **STATIC) | w.calibrate() | w.save("killed"), w.STEPS + 3),
}


@pytest.fixture
def start(comfyui_path, demo_checkpoint, tmp_path):
    """start() is a ComfyUI with a base directory of its own; all are stopped in the end."""
    running = []

    def make() -> GraphProcess:
        running.append(GraphProcess(comfyui_path, make_base(tmp_path / f"base{len(running)}", demo_checkpoint)))
        return running[-1]

    yield make
    for process in running:
        process.stop()


def _files(base: Path) -> list[str]:
    return sorted(path.name for path in (base / "models").rglob("*") if path.is_file())


def _kept(process: GraphProcess) -> tuple[Path, np.ndarray]:
    """A file saved while all was well, and the picture of its model."""
    outputs = process.outputs(w.stock_parts() | w.quantize() | w.save("kept") | w.sample(prefix="before"))
    return process.base / "models" / "checkpoints" / "kept.safetensors", picture(process, outputs)


def _opens(path: Path, expected: np.ndarray, graphs: GraphProcess) -> None:
    """Another ComfyUI makes the same picture of it."""
    shutil.copy(path, graphs.base / "models" / "checkpoints")
    graph = w.stock_parts() | w.load_quantized(f"checkpoints/{path.name}") | w.sample(model="load", prefix="after")
    assert np.array_equal(picture(graphs, graphs.outputs(graph)), expected)


@pytest.mark.parametrize("work", WORK)
def test_killed_in_the_middle_leaves_the_files_of_before(start, graphs, work):
    process = start()
    path, expected = _kept(process)
    before = _files(process.base)
    process.run_until_killed(*WORK[work])
    assert _files(process.base) == before
    _opens(path, expected, graphs)


def test_killed_between_two_runs_of_a_calibration_keeps_the_first(start, graphs):
    process = start()
    process.run_until_killed(w.stock_parts() | w.calibrate(runs=3, file_name="unfinished-killed"), kill_after=w.STEPS + 2)
    folder = graphs.base / "models" / "stepquant_calibrations"
    folder.mkdir(exist_ok=True)
    shutil.copy(process.base / "models" / "stepquant_calibrations" / "unfinished-killed.safetensors", folder)
    outputs = graphs.outputs(w.stock_parts() | w.calibrate(runs=3, file_name="unfinished-killed", resume=True))
    assert "saved as unfinished-killed.safetensors" in text(outputs, "calibrate")


def test_killed_while_saving_leaves_no_file_of_that_name(start, graphs):
    """The file is written under a hidden name, which no loader lists, and is in its place only when it is whole."""
    process = start()
    path, expected = _kept(process)
    run = threading.Thread(target=_run_until_dead, args=(process, w.stock_parts() | w.quantize() | w.save("killed")))
    run.start()
    deadline = time.monotonic() + 120
    while not (parts := list(path.parent.glob(".killed.*.part"))) and time.monotonic() < deadline:
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    run.join()
    assert parts, "nothing was written"
    target = path.with_name("killed.safetensors")
    assert target.exists() != bool(list(path.parent.glob(".killed.*.part")))
    _opens(target if target.exists() else path, expected, graphs)  # had it been too quick to be caught, the file is whole


def _run_until_dead(process: GraphProcess, prompt: dict) -> None:
    with pytest.raises((AssertionError, OSError, ValueError)):
        process.run(prompt)
        process.schemas()
