"""Launcher of fp8_geglu_gemm: GEGLU in the product's epilogue, or after torch._scaled_mm where the table says so."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import FP8, QuantizedActivation
from ..design import SCALED_MM
from ..finish import Finish
from ..fp8_geglu_gemm import check_fp8_geglu_gemm
from ..static_scale import StaticScale
from .fp8_gemm import scaled_mm, suits_scaled_mm
from .geglu_quantize import geglu_quantize
from .int8_geglu_gemm import geglu_design, launch_geglu_gemm
from .launch import compute_capability
from .quantize_token import quantize_token


def fp8_geglu_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    static: StaticScale | None = None,
) -> QuantizedActivation:
    """See fp8_geglu_gemm_ref; without `static`, values are rounded to `dtype` once between product and codes."""
    check_fp8_geglu_gemm(activation, qweight, weight_scale, bias, static)
    if static is not None:
        return launch_geglu_gemm(activation, qweight, weight_scale, None, bias, dtype, static, FP8)
    (M, K), N = activation.codes.shape, qweight.shape[0]
    design = geglu_design(M, N, K, compute_capability(qweight.device), FP8)
    if design.backend == SCALED_MM and suits_scaled_mm(activation, qweight, dtype):
        return geglu_quantize(scaled_mm(activation, qweight, weight_scale, bias, dtype, Finish()), None, FP8)
    return quantize_token(launch_geglu_gemm(activation, qweight, weight_scale, None, bias, dtype, None), FP8)
