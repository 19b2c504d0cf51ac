"""int8 matrix product with scales, zero point and bias. Formula, checks and reference; kernel in triton_ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import QuantizedActivation
from .exact_matmul import scaled_matmul_int8

# Above this, |acc| + |zero_point * weight_sum| <= K * 2 * 128 * 128 may pass 2^31.
MAX_K = 65_535


def check_weight_codes(operation: str, qweight: Tensor, weight_scale: Tensor, K: int, bias: Tensor | None) -> None:
    """Raise LayoutError unless qweight is int8 with K terms per output channel, and scale and bias have one entry per channel."""
    N = qweight.shape[0]
    if qweight.dtype != torch.int8 or qweight[0].numel() != K or K > MAX_K:
        raise LayoutError(
            f"{operation}: qweight is {qweight.dtype} {tuple(qweight.shape)} for {K} terms per output; "
            f"int8 with as many terms, at most {MAX_K}, is needed. Quantize this layer's own weight."
        )
    for name, vector in (("weight_scale", weight_scale), ("bias", bias)):
        if vector is not None and vector.shape != (N,):
            raise LayoutError(f"{operation}: {name} of shape {tuple(vector.shape)}; ({N},) is needed. Pass one entry per output channel.")


def check_gemm(
    activation: QuantizedActivation, qweight: Tensor, weight_scale: Tensor, weight_sum: Tensor | None, bias: Tensor | None
) -> None:
    """Raise LayoutError unless the operands of int8_gemm fit together."""
    if activation.codes.ndim != 2 or qweight.ndim != 2:
        raise LayoutError(
            f"int8_gemm: codes {tuple(activation.codes.shape)} and qweight {tuple(qweight.shape)}; (M, K) and (N, K) are needed. "
            "Use activation.as_rows() for images, int8_conv2d for 3x3 weights."
        )
    check_weight_codes("int8_gemm", qweight, weight_scale, activation.codes.shape[1], bias)
    if activation.zero_point is not None and (weight_sum is None or weight_sum.shape != weight_scale.shape):
        raise LayoutError("int8_gemm: a zero point without weight_sum (N,); pass qweight.sum(1, dtype=torch.int32).")


def int8_gemm_ref(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Linear layer on int8 codes: the products and their sum are integers, the result is scaled once.

    y[m, n] = scale[m] * weight_scale[n] * (acc[m, n] - zero_point[m] * weight_sum[n]) + bias[n]
    with acc[m, n] = sum_k codes[m, k] * qweight[n, k], exact int32; scale[m] is the activation's entry of row m.
    Args:
        activation: codes (M, K).
        qweight: (N, K) int8, K contiguous. weight_scale: (N,) fp32.
        weight_sum: (N,) int32, sum_k qweight[n, k]; may be None if the activation is symmetric.
        bias: (N,) any float dtype, or None.
    Returns: (M, N) out_dtype.
    Raises: LayoutError if the shapes do not fit or K > 65535.
    """
    check_gemm(activation, qweight, weight_scale, weight_sum, bias)
    N, symmetric = qweight.shape[0], activation.zero_point is None
    y = torch.empty(activation.rows, N, dtype=out_dtype, device=qweight.device)
    scaled_matmul_int8(
        activation.codes,
        qweight,
        activation.per_row(activation.scale),
        weight_scale,
        None if symmetric else activation.per_row(activation.zero_point),
        None if symmetric else weight_sum.view(1, N),
        None if bias is None else bias.float(),
        y,
    )
    return y
