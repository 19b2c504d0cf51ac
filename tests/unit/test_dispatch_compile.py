"""The largest kernels compile for Ampere and Hopper without spills. Needs no GPU. All of them, everywhere: compile_kernels.py."""

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
    most_registers = "gemm.* zero_point|conv2d .* concat zero_point|quantize|absmax|scale"
    command = [sys.executable, str(program), "--sm", "86,90", "--dtype", "fp16,int8", "--match", most_registers, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    reports = json.loads(result.stdout)
    kinds = {"conv2d", "quantize_token", "quantize_static", "quantize_flat", "slice_absmax", "image_scale"}
    expected = {(86, "gemm"), (90, "gluon_gemm")} | {(sm, kind) for sm in (86, 90) for kind in kinds}
    assert {(report["sm"], report["kernel"].split()[0]) for report in reports} == expected
    for report in reports:
        assert report["stack"] == report["spills"] == 0, report
        assert bool(report["mma"]) == (report["dtype"] == "int8"), report
