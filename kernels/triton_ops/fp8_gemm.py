"""Launcher of fp8_gemm: the Triton kernel, or torch._scaled_mm where the table says so. Formula: ../fp8_gemm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import QuantizedActivation
from ..design import SCALED_MM
from ..finish import Finish
from ..fp8_gemm import check_fp8_gemm
from .int8_gemm import gemm_design, launch_gemm
from .launch import compute_capability

# cuBLAS' fp8 products want sides that are multiples of it.
SCALED_MM_MULTIPLE = 16


def fp8_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    second: QuantizedActivation | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """See fp8_gemm_ref; sums are in the tensor cores' order and precision."""
    check_fp8_gemm(activation, qweight, weight_scale, bias, second)
    finish = Finish(addend)
    finish.check("fp8_gemm", activation.rows, qweight.shape[0])
    sm = compute_capability(activation.codes.device)
    design = gemm_design(activation.codes, None if second is None else second.codes, qweight.shape[0], sm)
    if design.backend == SCALED_MM and second is None and suits_scaled_mm(activation, qweight, out_dtype):
        return scaled_mm(activation, qweight, weight_scale, bias, out_dtype, finish)
    return launch_gemm(activation, second, qweight, weight_scale, None, bias, out_dtype, finish)


def suits_scaled_mm(activation: QuantizedActivation, qweight: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether torch._scaled_mm takes these operands."""
    codes = activation.codes
    multiples = all(side % SCALED_MM_MULTIPLE == 0 for side in qweight.shape)
    return multiples and codes.is_cuda and codes.is_contiguous() and out_dtype != torch.float32


def scaled_mm(
    activation: QuantizedActivation, qweight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype, finish: Finish
) -> Tensor:
    """One scale per row and column inside the product; the addend is a pass of its own."""
    row_scale = activation.per_row(activation.scale).view(-1, 1)
    bias = None if bias is None else bias.to(out_dtype)
    y = torch._scaled_mm(activation.codes, qweight.t(), row_scale, weight_scale.view(1, -1), bias, None, out_dtype, use_fast_accum=True)
    if finish.addend is not None:
        y.view(finish.addend.shape[0], -1, y.shape[1]).add_(finish.addend[:, None])
    return y
