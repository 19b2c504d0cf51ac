"""int8 matrix product over channel groups: one int32 sum, shifted at group borders. Formula, checks and reference; kernel in triton_ops."""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import QuantizedActivation
from .channel_group import Borders, ChannelGroups
from .exact_matmul import matmul_int8
from .int8_gemm import check_gemm

# Rows that the reference multiplies at a time: its int32 temporaries stay small.
ROWS_PER_BLOCK = 4096


def check_grouped_gemm(
    activation: QuantizedActivation,
    groups: ChannelGroups,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Raise LayoutError unless the operands of channel_group_gemm fit together."""
    check_gemm(activation, qweight, weight_scale, weight_sum, bias)
    groups.check("channel_group_gemm", activation.codes.shape[1])


def grouped_matmul(codes: Tensor, qweight: Tensor, borders: Borders, taps: int = 1) -> Tensor:
    """sum_j codes[m, j] * qweight[n, j] * 2^exponent[j], int32, by Horner's rule over the groups.

    Args: codes: (M, taps * K) int8. qweight: (N, taps * K) int8. borders: (start, end, shift) of each group within K.
    Returns: (M, N) int32.
    """
    M, N = codes.shape[0], qweight.shape[0]
    codes, qweight = codes.view(M, taps, -1), qweight.view(N, taps, -1)
    acc = torch.zeros(M, N, dtype=torch.int32, device=codes.device)
    for start, end, shift in borders:
        acc += matmul_int8(codes[..., start:end].reshape(M, -1), qweight[..., start:end].reshape(N, -1))
        acc <<= shift
    return acc


def channel_group_gemm_ref(
    activation: QuantizedActivation,
    groups: ChannelGroups,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Linear layer on codes in channel groups.

    y[m, n] = scale[m] * weight_scale[n] * (acc[m, n] - zero_point[m] * weight_sum[n]) + bias[n]
    with acc[m, n] = sum_j codes[m, j] * qweight[n, j] * 2^exponent[j], exact int32; the layer's exponents are such that it cannot wrap.
    Args:
        activation: codes (M, K) from quantize_channel_group.
        qweight: (N, K) int8, K in stored order. weight_scale: (N,) fp32.
        weight_sum: (N,) int32, sum_j qweight[n, j] * 2^exponent[j]. May be None if the activation is symmetric.
        bias: (N,) any float dtype, or None.
    Returns: (M, N) out_dtype.
    Raises: LayoutError if the shapes do not fit.
    Source: DGQ (arXiv 2501.04304), section 4.1; the shifted sum is this package's own.
    """
    check_grouped_gemm(activation, groups, qweight, weight_scale, weight_sum, bias)
    M, N, borders = activation.rows, qweight.shape[0], groups.borders
    scale = activation.per_row(activation.scale)
    zero_point = None if activation.zero_point is None else activation.per_row(activation.zero_point)
    y = torch.empty(M, N, dtype=out_dtype, device=qweight.device)
    for m in range(0, M, ROWS_PER_BLOCK):
        rows = slice(m, m + ROWS_PER_BLOCK)
        acc = grouped_matmul(activation.codes[rows], qweight, borders)
        if zero_point is not None:
            acc -= zero_point[rows, None] * weight_sum
        product = acc * (scale[rows, None] * weight_scale)
        y[rows] = product if bias is None else product + bias.float()
    return y
