"""The producers' largest kernels compile without spills. Needs no GPU. All kernels, all architectures: compile_producers.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_producers_compile_without_spills(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed: its kernels are not compiled here")
    program = Path(__file__).with_name("compile_producers.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # The package is found wherever this process found it.
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    most_registers = "token 1280|geglu static|moments|affine 2560|silu static$|wide|attention static (77|1024)"
    command = [sys.executable, str(program), "--sm", "86", "--match", most_registers, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    reports = json.loads(result.stdout)
    assert len(reports) == 14
    for report in reports:
        assert report["stack"] == report["spills"] == 0 and report["registers"] <= 168, report
