"""benchmarks/capped_card.py on the tests' small model and the CPU: it writes the files, opens them and samples its images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_capped_card_writes_files_that_open_and_sample(tmp_path, comfyui_path):
    out = tmp_path / "capped.jsonl"
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / "capped_card.py"), "--tiny", "--cpu", "--steps", "1", "--out", str(out)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["activations"] for record in records] == ["token", "static"]
    for record in records:
        assert record["images"] == 3 and not record["offloaded"]
        assert 0 < record["file GiB"] <= record["model GiB"] * 1.1
        assert all(record["checks"].values())


def test_capped_card_says_which_limit_is_missed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import capped_card

    record = {"file GiB": 1.4, "load peak RAM GiB": 5.0, "images": 2, "offloaded": True, "tensors' peak GiB": 2.0}
    assert [name for name, holds in capped_card.limits(record, cpu=False).items() if not holds] == [
        "opened in the file's size of RAM", "3 images", "no offload", "tensors' peak at most 1.9 GiB",
    ]  # fmt: skip


def test_capped_card_shows_comfyui_the_smaller_card(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import capped_card

    used, fractions = [2 * 10**9], []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (80 * 10**9 - used[0], 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.setattr(torch, "zeros", lambda *arguments, **named: None)
    capped_card.emulate_card(4, 3.2)
    assert fractions == [0.04]
    assert torch.cuda.mem_get_info() == (3_200_000_000, 4_000_000_000)
    used[0] += 10**9
    assert torch.cuda.mem_get_info() == (2_200_000_000, 4_000_000_000)
