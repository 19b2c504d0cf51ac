"""The Triton kernels compile for Ampere and Hopper, use int8 tensor cores and do not spill. No GPU is needed or used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_dispatch_kernels_compile_to_int8_tensor_cores_without_spills(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed: its kernels are not compiled here")
    program = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # The package is found wherever this process found it.
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    result = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    reports = json.loads(result.stdout)
    assert len(reports) == 8
    for report in reports:
        assert report["stack"] == 0, report
        assert report["int8_tensor_core"] == report["kernel"].startswith("_int8_"), report
