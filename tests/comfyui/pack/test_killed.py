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
from .test_nodes import picture


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_while_calibrating_leaves_the_files_of_before(comfyui_path, demo_checkpoint, graphs, tmp_path):
    base = make_base(tmp_path / "base", demo_checkpoint)
    process = GraphProcess(comfyui_path, base)
    outputs = process.outputs(w.stock_parts() | w.quantize() | w.save("kept") | w.sample(prefix="before"))
    before = _files(base)
    run = threading.Thread(target=_run_until_killed, args=(process, w.stock_parts() | w.calibrate(runs=64, steps=50, file_name="killed")))
    run.start()
    deadline = time.monotonic() + 120
    while "0/50" not in process.log.read_text(errors="replace") and time.monotonic() < deadline:  # the sampler's progress bar
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    run.join()
    assert _files(base) == before
    kept = base / "models" / "checkpoints" / "kept.safetensors"
    shutil.copy(kept, graphs.base / "models" / "checkpoints")
    again = graphs.outputs(w.stock_parts() | w.load_quantized("checkpoints/kept.safetensors") | w.sample(model="load", prefix="after"))
    assert np.array_equal(picture(graphs, again), picture(process, outputs))


def _files(base: Path) -> list[str]:
    return sorted(path.name for path in (base / "models").rglob("*") if path.is_file())


def _run_until_killed(process: GraphProcess, prompt: dict) -> None:
    with pytest.raises((AssertionError, OSError, ValueError)):
        process.run(prompt)
