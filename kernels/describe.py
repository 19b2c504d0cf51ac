"""What will run on this machine's devices, for the System check and benchmarks. Routes nothing: see dispatch.py."""

from __future__ import annotations

import os
from typing import Any

import torch

from .backend import Backend, choose_backend, triton_version
from .dispatch import OPERATIONS
from .tables import compute_type


def describe() -> dict[str, Any]:
    """What will run here, as plain data for the System check: versions, and per device the backend, why, and the remedy.

    Runs a test kernel on every CUDA device that could use the fast kernels.
    """
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    return {
        "torch": torch.__version__,
        "triton": triton_version(),
        "triton_interpreter": os.environ.get("TRITON_INTERPRET") == "1",
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "devices": [_describe_device(device) for device in devices],
    }


def _describe_device(device: torch.device) -> dict[str, Any]:
    choice = choose_backend(device)
    report: dict[str, Any] = {"device": str(device), "name": "CPU", "sm": None, "memory_gib": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        report.update(name=properties.name, memory_gib=round(properties.total_memory / 2**30, 1))
        report["sm"] = None if torch.version.hip else properties.major * 10 + properties.minor
    report.update(backend=choice.backend.value, reason=choice.reason, remedy=choice.remedy)
    report["fastest"] = compute_type(report["sm"]) if report["sm"] and choice.backend is Backend.TRITON else "int8"
    # Quantizing has no dequantized form: it is plain torch there.
    plain = Backend.REFERENCE if choice.backend is Backend.DEQUANTIZED else choice.backend
    report["operations"] = {name: (plain if "quantize" in name else choice.backend).value for name in OPERATIONS}
    return report
