"""What every launcher needs to know about the device and its operands. No kernels."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import re
from types import ModuleType

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

REGRESSED_SINCE = (3, 8)
# Gluon is experimental: 3.5 lacks names, 3.9 renamed some. Compiled with these and those between them, and run with the first.
TRIED_GLUON = (3, 6), (3, 9)
# Tensor descriptors need it of addresses and of all strides but the last, in bytes.
DESCRIPTOR_ALIGNMENT = 16
DESCRIPTOR_MIN_SM = 90


@functools.cache
def compute_capability(device: torch.device) -> int:
    """90 for sm_90; 0 where there is none (the interpreter on the CPU, AMD)."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a persistent kernel starts; a small number in the interpreter, so that it has to loop."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@functools.cache
def unroll_factor(sm: int, version: str = triton.__version__) -> int:
    """How often the loop over K is unrolled: 2 on sm_8x from Triton 3.8 on, else 1.

    There, the loop of an int8 dot shuffles bytes (348 instructions instead of 86, spills at 128x256) unless it is
    unrolled by two; Triton 3.6 and 3.7, and other GPUs, compile well without.
    """
    return 2 if sm // 10 == 8 and version_of(version) >= REGRESSED_SINCE else 1


@functools.cache
def gluon(launcher: str = "launch") -> ModuleType | None:
    """A module of gluon_ops; None, and a line in the log, with a Triton whose Gluon is another or was not tried."""
    try:
        if not TRIED_GLUON[0] <= version_of(triton.__version__) <= TRIED_GLUON[1]:
            raise ImportError("not one that it was compiled with")
        return importlib.import_module(f"..gluon_ops.{launcher}", __package__)
    except (ImportError, AttributeError) as error:
        logging.getLogger(__name__).warning(
            "Triton %s: its Gluon is another (%s); Triton's own kernels are used, which are slower on this GPU.", triton.__version__, error
        )
        return None


def version_of(text: str) -> tuple[int, ...]:
    """ "3.9.0+git" -> (3, 9)."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. triton.cdiv does the same and takes 10 us on the host."""
    return -(-a // b)


def can_describe(tensor: Tensor, sm: int) -> bool:
    """Whether a tensor descriptor of `tensor` can be made and used there; the interpreter (sm 0) takes any GPU's."""
    aligned = tensor.data_ptr() % DESCRIPTOR_ALIGNMENT == 0
    strides = all(stride * tensor.element_size() % DESCRIPTOR_ALIGNMENT == 0 for stride in tensor.stride()[:-1])
    return (sm == 0 or sm >= DESCRIPTOR_MIN_SM) and aligned and strides and tensor.stride(-1) == 1 and tensor.numel() > 0


def describe(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """A tensor descriptor whose loads are of shape `block`."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current CUDA device: make it the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
