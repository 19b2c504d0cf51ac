"""Files that appear whole or not at all: a process killed in the middle of writing leaves the old file, and no litter for long."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import stepquant
from stepquant.quant.atomic_file import ABANDONED_SECONDS, save_tensors

# Stops in the middle of writing, until it is killed.
WRITER = """
import sys, time
import torch
from stepquant.quant import atomic_file

def half(tensors, path, metadata):
    with open(path, "wb") as file:
        file.write(bytes(1 << 20))
    sys.stdout.write("half\\n")
    sys.stdout.flush()
    time.sleep(600)

atomic_file.save_file = half
atomic_file.save_tensors(sys.argv[1], {"a": torch.ones(4)}, {})
"""


def _kill_while_writing(path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(stepquant.__file__).parents[1]), *sys.path])}
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, env=environment)
    try:
        assert writer.stdout.readline().strip() == b"half"
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_process_leaves_the_old_file_and_the_next_save_clears_up(tmp_path):
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"a": torch.ones(4)}, {})
    _kill_while_writing(path)
    left = list(tmp_path.glob(".*.part"))
    assert len(left) == 1
    assert torch.equal(load_file(path)["a"], torch.ones(4))
    save_tensors(path, {"a": torch.zeros(4)}, {})
    assert left[0].exists(), "another process might still be writing it"
    abandoned = time.time() - ABANDONED_SECONDS - 1
    os.utime(left[0], (abandoned, abandoned))
    save_tensors(path, {"a": torch.zeros(4)}, {})
    assert [one.name for one in tmp_path.iterdir()] == ["model.safetensors"]


def test_other_files_are_not_cleared_up(tmp_path):
    others = [tmp_path / name for name in (".other.1.part", "model.part", ".model.1.txt")]
    for other in others:
        other.write_text("")
        os.utime(other, (0, 0))
    save_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(4)}, {})
    assert all(other.exists() for other in others)
