"""The Gluon kernels compile for Hopper without spills, with products in flight. Needs no GPU. All of them: compile_gluon.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_gluon_kernels_compile_without_spills_and_keep_products_in_flight(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed: its kernels are not compiled here")
    program = Path(__file__).with_name("compile_gluon.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # The package is found wherever this process found it.
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    kernels = "int8 (gemm 2048x(1280x5120|10240x1280) addend|gemm 2048x3840.*three|geglu 2048.*codes|conv3x3)"
    result = subprocess.run(
        [sys.executable, str(program), "--match", kernels, "--json"], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    reports = json.loads(result.stdout)
    assert len(reports) == 8, [report["kernel"] for report in reports]
    for report in reports:
        assert report["stack"] == report["spills"] == 0, report
        assert report["mma"] and report["in_flight"], report
