"""The single dispatch point: every integer operation is called here and routed by its tensor's device."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .activation import QuantizedActivation
from .backend import Backend, BackendChoice, choose_backend, forget_choices, triton_version
from .dequantized import dequantized_conv2d, dequantized_gemm
from .int8_conv2d import border_sums, int8_conv2d_ref
from .int8_gemm import int8_gemm_ref
from .quantize_image import quantize_image_ref
from .quantize_static import quantize_static_ref
from .quantize_token import quantize_token_ref

__all__ = [
    "Backend",
    "BackendChoice",
    "QuantizedActivation",
    "border_sums",
    "choose_backend",
    "describe",
    "forget_choices",
    "int8_conv2d",
    "int8_gemm",
    "quantize_image",
    "quantize_static",
    "quantize_token",
]

_REFERENCE: dict[str, Callable[..., Any]] = {
    "quantize_token": quantize_token_ref,
    "quantize_image": quantize_image_ref,
    "quantize_static": quantize_static_ref,
    "int8_gemm": int8_gemm_ref,
    "int8_conv2d": int8_conv2d_ref,
}
_DEQUANTIZED = {**_REFERENCE, "int8_gemm": dequantized_gemm, "int8_conv2d": dequantized_conv2d}
_triton: dict[str, Callable[..., Any]] = {}


def _implementation(operation: str, device: torch.device) -> Callable[..., Any]:
    backend = choose_backend(device).backend
    if backend is Backend.TRITON:
        return _triton.get(operation) or _import_kernel(operation)
    return (_REFERENCE if backend is Backend.REFERENCE else _DEQUANTIZED)[operation]


def _import_kernel(operation: str) -> Callable[..., Any]:
    """Import Triton and one kernel at its first use: neither may cost anything before, nor be needed where it is absent."""
    module = importlib.import_module(f".triton_ops.{operation}", __package__)
    _triton[operation] = getattr(module, operation)
    return _triton[operation]


def quantize_token(x: Tensor) -> QuantizedActivation:
    """One symmetric scale per row of x (M, K); see quantize_token_ref."""
    return _implementation("quantize_token", x.device)(x)


def quantize_image(x: Tensor) -> QuantizedActivation:
    """One symmetric scale per image of x (B, C, H, W), NHWC codes; see quantize_image_ref."""
    return _implementation("quantize_image", x.device)(x)


def quantize_static(x: Tensor, scale: Tensor, zero_point: Tensor | None, bucket: Tensor) -> QuantizedActivation:
    """The stored scale of each sample's timestep bucket, for x (M, K) or (B, C, H, W); see quantize_static_ref."""
    return _implementation("quantize_static", x.device)(x, scale, zero_point, bucket)


def int8_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Linear layer on int8 codes -> (M, N) out_dtype; see int8_gemm_ref."""
    implementation = _implementation("int8_gemm", activation.codes.device)
    return implementation(activation, qweight, weight_scale, weight_sum, bias, out_dtype)


def int8_conv2d(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    border_sums: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Conv2d on int8 codes -> (B, Cout, Ho, Wo) out_dtype, channels_last; see int8_conv2d_ref."""
    implementation = _implementation("int8_conv2d", activation.codes.device)
    return implementation(activation, qweight, weight_scale, border_sums, bias, stride, padding, out_dtype)


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
    # Quantizing has no dequantized form: it is plain torch there.
    plain = Backend.REFERENCE if choice.backend is Backend.DEQUANTIZED else choice.backend
    report["operations"] = {name: (plain if name.startswith("quantize") else choice.backend).value for name in _REFERENCE}
    return report
