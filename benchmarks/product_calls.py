"""Operands for one call of an SDXL product, on a GPU for timing or on the meta device to see what would be compiled."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.int8_conv2d import border_sums
from stepquant.kernels.int8_upsample_conv2d import PhaseWeight
from stepquant.kernels.sdxl_products import BATCH, SdxlProduct

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
OUTPUT_SIDES = {"conv3x3_stride2": 0.5, "upsample2x": 2}  # per input side


def operation_name(product: SdxlProduct, dtype: str) -> str:
    """The operation in dispatch that serves the product."""
    if product.op == "upsample2x":
        return "int8_upsample_conv2d"
    if product.op == "geglu":
        return f"{dtype}_geglu_gemm"
    return f"{dtype}_{'gemm' if product.op == 'gemm' else 'conv2d'}"


def only_int8(product: SdxlProduct) -> bool:
    """Whether there is no fp8 kernel for the product."""
    return operation_name(product, "fp8").startswith("int8")


def launcher(product: SdxlProduct, dtype: str) -> Callable[..., Any]:
    """The Triton launcher itself, without dispatch."""
    name = operation_name(product, dtype)
    return getattr(importlib.import_module(f"stepquant.kernels.triton_ops.{name}"), name)


def reference(product: SdxlProduct, dtype: str) -> Callable[..., Any]:
    """The launcher's reference twin, with the same arguments."""
    name = operation_name(product, dtype)
    return getattr(importlib.import_module(f"stepquant.kernels.{name}"), f"{name}_ref")


def call_arguments(product: SdxlProduct, dtype: str, device: str, static: bool = True) -> dict[str, Any]:
    """Keyword arguments of launcher and reference: random codes, scales that give outputs near 1, zero points if `static`."""
    with torch.device(device):
        return _arguments(product, dtype, static and dtype == "int8")


def _arguments(product: SdxlProduct, dtype: str, static: bool) -> dict[str, Any]:
    is_gemm, N, C = product.op in ("gemm", "geglu"), product.N, sum(product.K)
    has_zero_point = static and product.asymmetric
    shape = (product.M,) if is_gemm else (BATCH, product.side, product.side)
    segments = [_activation((*shape, channels), dtype, has_zero_point) for channels in product.K]
    arguments: dict[str, Any] = {"activation": segments[0], "bias": torch.randn(N).half() if product.bias else None}
    if product.op == "geglu":
        arguments |= {"qweight": _codes((N, C), dtype), "weight_scale": torch.rand(N) * 1e-2}
        return arguments
    arguments["addend"] = _addend(product)
    weight_scale = torch.rand(N) * 1e-2
    if product.op == "upsample2x":
        arguments["weight"] = PhaseWeight(_codes((4, N, 2, 2, C), dtype), torch.rand(4, N) * 1e-2, torch.zeros(4, 16, N, dtype=torch.int32))
        return arguments
    qweight = _codes((N, C) if is_gemm else (N, 3, 3, C), dtype)
    arguments |= {"qweight": qweight, "weight_scale": weight_scale, "second": segments[1] if len(segments) > 1 else None}
    if not is_gemm:
        arguments["stride"] = 2 if product.op.endswith("stride2") else 1
    if has_zero_point:
        parts = qweight.split(product.K, -1)
        sums = [part.sum(1, dtype=torch.int32) if is_gemm else border_sums(part) for part in parts]
        arguments["weight_sum" if is_gemm else "border_sums"] = sums[0] if len(sums) == 1 else torch.stack(sums)
    return arguments


def _addend(product: SdxlProduct) -> Tensor | None:
    if product.addend == "image":
        return torch.randn(BATCH, product.N).half()
    if product.addend == "residual" and product.op == "gemm":
        return torch.randn(product.M, product.N).half()
    if product.addend == "residual":
        side = int(product.side * OUTPUT_SIDES.get(product.op, 1))
        return torch.randn(BATCH, side, side, product.N).half().permute(0, 3, 1, 2)
    return None


def _activation(shape: tuple[int, ...], dtype: str, has_zero_point: bool) -> QuantizedActivation:
    rows = torch.Size(shape[:-1]).numel()
    samples = 1 if rows % BATCH else BATCH
    zero_point = torch.full((samples,), -100, dtype=torch.int32) if has_zero_point else None
    return QuantizedActivation(_codes(shape, dtype), torch.rand(samples) * 1e-2, zero_point, rows // samples)


def _codes(shape: tuple[int, ...], dtype: str) -> Tensor:
    if dtype == "int8":
        return torch.randint(-127, 128, shape, dtype=torch.int8)
    return (torch.randn(shape) * 30).to(CODES[dtype])
