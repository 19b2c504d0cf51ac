"""Products with 4-bit weights compile without spills, weights straight into the tensor cores. Needs no GPU. All: compile_int4.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_int4_products_compile_to_int8_tensor_cores_without_a_way_through_shared_memory(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed: its kernels are not compiled here")
    program = Path(__file__).with_name("compile_int4.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # The package is found wherever this process found it.
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    kernels = "^gemm 2048x10240|geglu 2048.*codes|many 2048|few rows|expand int8"
    command = [sys.executable, str(program), "--sm", "86,90", "--match", kernels, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    reports = json.loads(result.stdout)
    assert len(reports) == 10
    for report in reports:
        assert report["stack"] == report["spills"] == 0, report
        if report["kernel"] not in ("few rows", "expand int8"):
            assert report["mma"] and not report["stored"], report
