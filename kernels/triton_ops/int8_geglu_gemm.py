"""Kernel and launcher of int8_geglu_gemm: a tile's left half are values, its right half their gates. Formula: ../int8_geglu_gemm.py."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..design import Design, default_gemm_design
from ..int8_geglu_gemm import OPERATION, check_geglu_gemm
from ..repeat import empty, launch
from ..static_scale import StaticScale
from ..tables import Product, tuned_design
from .accumulate import gemm_from_pointers, tile_position
from .activations import gelu_erf
from .clipping import add_clipped, beyond_codes, count
from .encoding import encode, reciprocal, static_entry
from .epilogue import halves, in_parts
from .gemm_kernel import scaled_sums
from .int8_gemm import design_constants, divides_k, fitting, k_contiguous, optional_bias
from .launch import cdiv, compute_capability, describe, on_device
from .scale_entries import scale_entries

# Sizes whose value or divisibility must not make another compiled kernel: none of them is a stride.
RUNTIME_ONLY = ["M", "has_bias", "rows_per_scale", "rows_per_entry"]


@triton.jit
def _halved_sums(
    codes, qweight, first_m, first_n, local_m, inside_m, M, N, K, stride_am, stride_wn,
    TMA: tl.constexpr, ACC: tl.constexpr, EVEN_K: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) sums: BLOCK_N / 2 columns from first_n on, and as many from N + first_n on."""
    HALF: tl.constexpr = BLOCK_N // 2
    if TMA:
        m, n = first_m.to(tl.int32), first_n.to(tl.int32)
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for k in tl.range(0, K, BLOCK_K):
            a = codes.load([m, k])
            w = qweight.load([0, n, k]).reshape(BLOCK_N, BLOCK_K)
            acc = tl.dot(a, w.T, acc, out_dtype=ACC)
    else:
        local_n = tl.arange(0, BLOCK_N)
        inside_n = local_n % HALF < N - first_n
        acc = gemm_from_pointers(
            codes + first_m * stride_am, qweight + first_n * stride_wn, local_m, local_n % HALF + local_n // HALF * N, inside_m, inside_n,
            K, 0, K, stride_am, stride_wn, ACC, EVEN_K, UNROLL, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return acc


@triton.jit
def _projected(
    acc, scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, bias_end, rows, rows_per_scale, columns, inside_m, inside_n
):
    """The Linear layer's result, fp32. bias_end: 2N, or 0 if there is no bias."""
    y = scaled_sums(acc, scale_ptr, zero_point_ptr, weight_sum_ptr, 0, rows, rows_per_scale, columns, inside_m, inside_n)
    y = y * tl.load(weight_scale_ptr + columns, mask=inside_n, other=0.0)[None, :]
    return y + tl.load(bias_ptr + columns, mask=inside_n & (columns < bias_end), other=0.0).to(tl.float32)[None, :]


@triton.jit
def _gated(
    values, gates, scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, bias_end, rows, rows_per_scale, columns, N,
    inside_m, inside_n,
):  # fmt: skip
    """value * gelu(gate), fp32, of some of a tile's columns."""
    gate = _projected(
        gates, scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, bias_end, rows, rows_per_scale, N + columns,
        inside_m, inside_n,
    )  # fmt: skip
    return gelu_erf(gate) * _projected(
        values, scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, bias_end, rows, rows_per_scale, columns,
        inside_m, inside_n,
    )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _geglu_gemm_kernel(
    codes, qweight, y_ptr,
    scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, has_bias,
    table_ptr, zero_table_ptr, bucket_ptr, out_scale_ptr, out_zero_point_ptr, clipped_ptr,
    M, N, K, stride_am, stride_wn, rows_per_scale, rows_per_entry,
    TMA: tl.constexpr, ACC: tl.constexpr, EVEN_K: tl.constexpr, UNROLL: tl.constexpr, PARTS: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """codes and qweight are pointers, or descriptors if TMA, the weight's then of (2, N, K). N counts the values.

    With a table_ptr codes are stored, and their entries' scales and zero points in out_scale_ptr and out_zero_point_ptr.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    WIDTH: tl.constexpr = HALF // PARTS
    tile_m, tile_n = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, HALF), GROUP_M)
    # 64 bit for the tile's corner only, as in gemm_kernel.py.
    first_m = tile_m.to(tl.int64) * BLOCK_M
    first_n = tile_n.to(tl.int64) * HALF
    local_m = tl.arange(0, BLOCK_M)
    inside_m = local_m < M - first_m
    rows = first_m + local_m
    acc = _halved_sums(
        codes, qweight, first_m, first_n, local_m, inside_m, M, N, K, stride_am, stride_wn,
        TMA, ACC, EVEN_K, UNROLL, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    values, gates = halves(acc, BLOCK_M, BLOCK_N)
    value_parts = in_parts(values, PARTS, BLOCK_M, HALF)
    gate_parts = in_parts(gates, PARTS, BLOCK_M, HALF)
    local_n = tl.arange(0, WIDTH)
    bias_end = has_bias * 2 * N
    if table_ptr is not None:
        HAS_ZERO_POINT: tl.constexpr = zero_table_ptr is not None
        local_rows = rows.to(tl.int32)
        entry = local_rows // rows_per_entry
        first = inside_m & (local_rows % rows_per_entry + tile_n == 0)
        out_scale, out_zero_point = static_entry(
            table_ptr, zero_table_ptr, bucket_ptr, out_scale_ptr, out_zero_point_ptr, entry, inside_m, first, HAS_ZERO_POINT
        )
        inverse = reciprocal(out_scale)[:, None]
        zero_points = out_zero_point[:, None]
    if clipped_ptr is not None:
        beyond = tl.zeros((BLOCK_M, WIDTH), tl.int32)  # by place in a part: one reduction, after the last
    for part in tl.static_range(PARTS):
        part_n = first_n + part * WIDTH
        y = _gated(
            value_parts[part], gate_parts[part], scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, bias_end,
            rows, rows_per_scale, part_n + local_n, N, inside_m, local_n < N - part_n,
        )  # fmt: skip
        inside = inside_m[:, None] & (local_n < N - part_n)[None, :]
        if clipped_ptr is not None:
            beyond += (inside & beyond_codes(y, inverse, zero_points, HAS_ZERO_POINT)).to(tl.int32)
        if table_ptr is not None:
            y = encode(y, inverse, zero_points, HAS_ZERO_POINT)
        tl.store(y_ptr + (first_m * N + part_n) + local_m[:, None] * N + local_n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    if clipped_ptr is not None:
        add_clipped(clipped_ptr, count(beyond), M, tile_m + tile_n == 0)


def int8_geglu_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    static: StaticScale | None = None,
) -> Tensor | QuantizedActivation:
    """See int8_geglu_gemm_ref: the integer sums are the same, GELU is within 3e-5 (gelu_erf), codes at most 1 apart."""
    check_geglu_gemm(activation, qweight, weight_scale, weight_sum, bias, static)
    codes, halved = k_contiguous(activation.codes), k_contiguous(qweight).unflatten(0, (2, -1))
    (M, K), N = codes.shape, halved.shape[1]
    sm = compute_capability(codes.device)
    design = fitting(geglu_design(M, 2 * N, K, sm), (codes, None, halved), sm)
    y = empty((M, N), out_dtype if static is None else torch.int8, codes.device)
    tiles = cdiv(M, design.BLOCK_M) * cdiv(N, design.BLOCK_N // 2)
    strides = (codes.stride(0), halved.stride(1))
    if design.tma:
        codes = describe(codes, [design.BLOCK_M, design.BLOCK_K])
        halved = describe(halved, [2, design.BLOCK_N // 2, design.BLOCK_K])
    constants = design_constants(design, torch.int8, sm)
    del constants["SPLIT_K"], constants["PERSISTENT"]
    entries = None if static is None else scale_entries(OPERATION, static, M, M, M, y.device)
    out = (None,) * 6
    if entries is not None:
        out = (static.scale, static.zero_point, static.bucket, entries.scale, entries.zero_point, static.clipped)
    with on_device(y):
        launch(
            _geglu_gemm_kernel, (tiles,),
            codes, halved, y,
            activation.scale, activation.zero_point, weight_scale, weight_sum, *optional_bias(bias, y), *out,
            M, N, K, *strides, activation.rows_per_scale, 1 if entries is None else entries.rows_per_scale,
            EVEN_K=divides_k(design, K), **constants,
        )  # fmt: skip
    return y if entries is None else QuantizedActivation(y, entries.scale, entries.zero_point, entries.rows_per_scale)


def geglu_design(M: int, N: int, K: int, sm: int) -> Design:
    """The table's design for this product, or for the same one without GEGLU, or the default; neither split nor persistent.

    N: rows of the weight, values and gates, of which a tile takes BLOCK_N. So its sums and operands cost as without GEGLU.
    """
    tuned = tuned_design(sm, Product("geglu", "int8", 1, M, N, K)) or tuned_design(sm, Product("gemm", "int8", 1, M, N, K))
    return replace(tuned or default_gemm_design(sm, M, N), split_k=1, persistent=False)
