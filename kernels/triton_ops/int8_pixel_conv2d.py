"""Triton kernel of int8_pixel_conv2d: implicit GEMM over NHWC, one integer sum per tap. Formula: ../int8_pixel_conv2d.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..finish import as_images
from ..int8_conv2d import output_side
from ..int8_pixel_conv2d import check_pixel_conv
from ..repeat import empty, launch
from .accumulate import tile_position
from .launch import cdiv, on_device

# Two accumulators, int32 and fp32: with 4 warps they take all registers there are and spill on sm_86.
BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M = 128, 64, 64, 8
NUM_WARPS, NUM_STAGES = 8, 3
# Sizes whose value or divisibility must not make another compiled kernel.
RUNTIME_ONLY = ["M", "H", "W", "Ho", "Wo", "has_bias"]


@triton.jit
def _tap_sum(sums_ptr, row, column, columns, inside_n, N):
    """(BLOCK_N,) int32: sum of the weight codes of one tap, from the sums of border classes.

    Along a side: first tap = class 0 - class 1 (the first one out), last = 0 - 2 (the last one out), middle = class 3 (both out).
    """
    row_plus, row_minus = tl.where(row == 1, 3, 0), row // 2 + 1
    column_plus, column_minus = tl.where(column == 1, 3, 0), column // 2 + 1
    two_rows, two_columns = inside_n & (row != 1), inside_n & (column != 1)
    table = sums_ptr + columns
    total = tl.load(table + (4 * row_plus + column_plus) * N, mask=inside_n, other=0)
    total -= tl.load(table + (4 * row_minus + column_plus) * N, mask=two_rows, other=0)
    total -= tl.load(table + (4 * row_plus + column_minus) * N, mask=two_columns, other=0)
    total += tl.load(table + (4 * row_minus + column_minus) * N, mask=two_rows & two_columns, other=0)
    return total


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _pixel_conv2d_kernel(
    codes_ptr, qweight_ptr, y_ptr, scale_ptr, zero_point_ptr, weight_scale_ptr, border_sums_ptr, bias_ptr, has_bias,
    M, N, C, H, W, Ho, Wo,
    STRIDE: tl.constexpr, EVEN_C: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_m = rows < M
    image, pixel = rows // (Ho * Wo), (rows % (Ho * Wo)).to(tl.int32)
    first_h, first_w = pixel // Wo * STRIDE - 1, pixel % Wo * STRIDE - 1
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = columns < N
    ks = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in range(0, 9):
        h, w = first_h + tap // 3, first_w + tap % 3
        inside = inside_m & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        source = (image * H + h) * W + w
        a_ptrs = codes_ptr + source[:, None] * C + ks[None, :]
        b_ptrs = qweight_ptr + columns[None, :].to(tl.int64) * (9 * C) + tap * C + ks[:, None]
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for k in range(0, C, BLOCK_K):
            if EVEN_C:
                a = tl.load(a_ptrs + k, mask=inside[:, None], other=0)
                b = tl.load(b_ptrs + k, mask=inside_n[None, :], other=0)
            else:
                a = tl.load(a_ptrs + k, mask=inside[:, None] & (ks[None, :] < C - k), other=0)
                b = tl.load(b_ptrs + k, mask=inside_n[None, :] & (ks[:, None] < C - k), other=0)
            sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        if zero_point_ptr is not None:
            zero_point = tl.load(zero_point_ptr + source, mask=inside, other=0)
            sums -= zero_point[:, None] * _tap_sum(border_sums_ptr, tap // 3, tap % 3, columns, inside_n, N)[None, :]
        acc += sums.to(tl.float32) * tl.load(scale_ptr + source, mask=inside, other=0.0)[:, None]
    y = acc * tl.load(weight_scale_ptr + columns, mask=inside_n, other=0.0)[None, :]
    y += tl.load(bias_ptr + columns, mask=columns < has_bias * N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * N + columns[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])


def int8_pixel_conv2d(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    border_sums: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int = 1,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """See int8_pixel_conv2d_ref; the integer sums are exact, scaling and adding them may round differently."""
    check_pixel_conv(activation, qweight, weight_scale, border_sums, bias, stride)
    B, H, W, C = activation.codes.shape
    N = qweight.shape[0]
    Ho, Wo = output_side(H, 3, stride, 1), output_side(W, 3, stride, 1)
    M = B * Ho * Wo
    y = empty((M, N), out_dtype, activation.codes.device)
    with on_device(y):
        launch(
            _pixel_conv2d_kernel, (cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),),
            activation.codes, qweight, y, activation.scale, activation.zero_point, weight_scale,
            None if activation.zero_point is None else border_sums, y if bias is None else bias, int(bias is not None),
            M, N, C, H, W, Ho, Wo,
            STRIDE=stride, EVEN_C=C % BLOCK_K == 0, GROUP_M=GROUP_M, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
    return as_images(y, B, Ho, Wo)
