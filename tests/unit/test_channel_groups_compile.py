"""The channel group kernels compile for Ampere and Hopper without spills. Needs no GPU. Everywhere: compile_channel_groups.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_channel_group_kernels_compile_to_int8_tensor_cores_without_spills(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed: its kernels are not compiled here")
    program = Path(__file__).with_name("compile_channel_groups.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # The package is found wherever this process found it.
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, str(program), "--sm", "86,90", "--match", "10240|@32|token", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    reports = json.loads(result.stdout)
    assert len(reports) == 6
    for report in reports:
        assert report["stack"] == report["spills"] == 0, report
        assert bool(report["mma"]) == (report["dtype"] == "int8"), report
