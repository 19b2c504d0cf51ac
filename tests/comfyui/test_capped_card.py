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
    command = [sys.executable, str(BENCHMARKS / "capped_card.py"), "--tiny", "--cpu", "--steps", "2", "--out", str(out)]
    command += ["--accelerations", "auto"]
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

    record = {"flags": "classic", "file GiB": 1.4, "load peak RAM GiB": 5.0, "images": 2, "offloaded": True}
    record |= {"reserved peak GiB": 2.0, "driver peak GiB": 1.8}
    assert [name for name, holds in capped_card.limits(record, cpu=False).items() if not holds] == [
        "opened in the file's size of RAM", "3 images", "no offload", "reserved peak at most 1.9 GiB",
    ]  # fmt: skip
    assert capped_card.limits(record | {"flags": "default"}, cpu=False)["driver peak at most 1.9 GiB"]


def test_capped_card_shows_comfyui_the_smaller_card(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import capped_session

    used, fractions = [2 * 10**9], []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (80 * 10**9 - used[0], 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.setattr(torch, "zeros", lambda *arguments, **named: None)
    capped_session.emulate_card(4, 3.2)
    assert fractions == [0.04]
    assert torch.cuda.mem_get_info() == (3_200_000_000, 4_000_000_000)
    used[0] += 10**9
    assert torch.cuda.mem_get_info() == (2_200_000_000, 4_000_000_000)


def test_capped_session_names_what_lives_when_tensors_take_most(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import capped_session

    def event(action, address, mib, place=()):
        return {"action": action, "addr": address, "size": mib * 2**20, "frames": place}

    frames = [
        {"filename": "/x/stepquant/hosts/fused.py", "line": 7, "name": "feed_forward"},
        {"filename": "/x/torch/y.py", "line": 1, "name": "z"},
    ]
    events = [event("alloc", 1, 10, frames), event("alloc", 2, 40), event("free_requested", 2, 40), event("alloc", 3, 10, frames)]
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **_: None)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"device_traces": [events]})
    assert capped_session.live_at_peak(lambda: None) == ["50.0 MiB in all", "1 x 40.00 MiB ", "1 x 10.00 MiB fused.py:7 feed_forward"]
