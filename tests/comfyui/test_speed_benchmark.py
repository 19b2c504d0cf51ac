"""benchmarks/speed.py on the tests' small model and the CPU: every row it can measure there, written with all its fields."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_speed_measures_and_records_our_rows_beside_the_reference(tmp_path, comfyui_path):
    out = tmp_path / "speed.jsonl"
    arguments = [
        "--tiny",
        "--layerwise",
        "--device",
        "cpu",
        "--others",
        "--schemes",
        "token",
        "--no-session",
        "--in-turns",
        "--out",
        str(out),
    ]
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / "speed.py"), *arguments]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    turns = {row["mode"]: row for row in rows if row["kind"] == "in turns"}
    assert turns["ComfyUI fp16"]["fp16_over_this"] == 1 and turns["ours w8a8-token fused"]["fp16_over_this"] > 0
    rows = [row for row in rows if row["kind"] != "in turns"]
    assert [row["mode"] for row in rows] == ["ComfyUI fp16", *["ours w8a8-token fused"] * 2, "ours w8a8-token layerwise"]
    assert all(row["step_ms"] > 0 and row["kind"] == "unet step" and row["utc"] for row in rows)
    assert all(min(row["calls_ms"]) <= row["step_ms"] + 0.01 and row["step_ms"] <= max(row["calls_ms"]) + 0.01 for row in rows)
    assert all(row["integer_mac_share"] == 1 and row["sqnr_db"] > 15 for row in rows[1:])


def test_speed_profiles_when_every_row_is_measured(tmp_path, monkeypatch):
    """The profiler stays in a process once it was used, and must be in no row."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import speed
    import speed_models

    done = []
    for name in ("measure_others", "measure_sessions"):
        monkeypatch.setattr(speed, name, lambda *_: None)
    monkeypatch.setattr(speed, "measure_ours", lambda table, gpu, scheme, *_, **__: done.append(("rows", scheme)))
    monkeypatch.setattr(speed, "profile_ours", lambda table, gpu, scheme, *_: done.append(("profile", scheme)))
    monkeypatch.setattr(speed_models, "write_source", lambda *_: None)
    monkeypatch.setattr(speed_models, "UNetCall", lambda *_: None)
    gpu = speed.Gpu("cuda")
    speed.measure(speed.Table(None, 60, {}), gpu, tmp_path, speed.parse(["--schemes", "token", "fp8", "--profile"]))
    assert done == [("rows", "token"), ("rows", "fp8"), ("profile", "token"), ("profile", "fp8")]


def test_time_split_groups_kernels_and_finds_the_gaps(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import speed_profile

    events = [
        {"name": "_gemm_kernel", "ts": 0.0, "dur": 3000.0},
        {"name": "cudnn_generated_fort_native_sdpa_flash_fprop", "ts": 2500.0, "dur": 1000.0},
        {"name": "_normalize_quantize_kernel", "ts": 5000.0, "dur": 1000.0},
    ]
    monkeypatch.setattr(speed_profile, "_kernels", lambda call: events)
    monkeypatch.setattr(speed_profile, "CALLS", 1)
    split = speed_profile.time_split(lambda: None)
    assert split["groups_ms"] == {"GEMM": [3.0, 1], "attention": [1.0, 1], "quantize and norm": [1.0, 1]}
    assert split["gaps_ms"] == pytest.approx(1.5)
    assert any("attention" in line for line in speed_profile.lines(split))
