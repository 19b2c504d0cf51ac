"""What every launcher needs to know about the device. No kernels."""

from __future__ import annotations

import contextlib
import functools
import re

import torch
import triton

REGRESSED_SINCE = (3, 8)


@functools.cache
def compute_capability(device: torch.device) -> int:
    """90 for sm_90; 0 where there is none (the interpreter on the CPU, AMD)."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.cache
def unroll_factor(sm: int, version: str = triton.__version__) -> int:
    """How often the loop over K is unrolled: 2 on sm_8x from Triton 3.8 on, else 1.

    There, the loop of an int8 dot shuffles bytes (348 instructions instead of 86, spills at 128x256) unless it is
    unrolled by two; Triton 3.6 and 3.7, and other GPUs, compile well without.
    """
    major, minor = (int(part) for part in re.findall(r"\d+", version)[:2])
    return 2 if sm // 10 == 8 and (major, minor) >= REGRESSED_SINCE else 1


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current CUDA device: make it the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
