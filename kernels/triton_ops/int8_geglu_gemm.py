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
from ..int8_gemm_many import LinearWeight
from ..repeat import empty, launch
from ..static_scale import StaticScale
from ..tables import Product, tuned_design
from .accumulate import gemm_from_pointers, tile_position
from .gated_epilogue import store_gated
from .int8_gemm import DTYPE_NAME, design_constants, divides_k, fitting, k_contiguous, optional_bias, serves_gluon
from .launch import cdiv, compute_capability, describe, gluon, on_device
from .scale_entries import ScaleEntries, scale_entries

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
    tile_m, tile_n = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, HALF), GROUP_M)
    # 64 bit for the tile's corner only, as in gemm_kernel.py.
    first_m = tile_m.to(tl.int64) * BLOCK_M
    first_n = tile_n.to(tl.int64) * HALF
    local_m = tl.arange(0, BLOCK_M)
    inside_m = local_m < M - first_m
    acc = _halved_sums(
        codes, qweight, first_m, first_n, local_m, inside_m, M, N, K, stride_am, stride_wn,
        TMA, ACC, EVEN_K, UNROLL, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    store_gated(
        acc, y_ptr, tile_m, tile_n, first_m, first_n, scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, has_bias,
        table_ptr, zero_table_ptr, bucket_ptr, out_scale_ptr, out_zero_point_ptr, clipped_ptr, M, N, rows_per_scale, rows_per_entry,
        PARTS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def int8_geglu_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    static: StaticScale | None = None,
    codes: torch.dtype = torch.int8,
) -> Tensor | QuantizedActivation:
    """See int8_geglu_gemm_ref: the integer sums are the same, GELU is within 3e-5 (gelu_erf), codes at most 1 apart."""
    check_geglu_gemm(activation, qweight, weight_scale, weight_sum, bias, static, codes)
    return launch_geglu_gemm(activation, qweight, weight_scale, weight_sum, bias, out_dtype, static, codes)


def launch_geglu_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    static: StaticScale | None,
    stored: torch.dtype = torch.int8,
) -> Tensor | QuantizedActivation:
    """int8_geglu_gemm of operands that have been checked; of fp8 codes too. stored: dtype of the codes that `static` makes."""
    codes, halved = k_contiguous(activation.codes), k_contiguous(qweight).unflatten(0, (2, -1))
    (M, K), N = codes.shape, halved.shape[1]
    sm = compute_capability(codes.device)
    dtype = codes.dtype
    design = geglu_design(M, 2 * N, K, sm, dtype)
    entries = None if static is None else scale_entries(OPERATION, static, M, M, M, codes.device)
    y_dtype = out_dtype if static is None else stored
    if serves_gluon(design, activation, [qweight], (out_dtype if static is None else None,), N * y_dtype.itemsize, sm):
        layer = LinearWeight(qweight, weight_scale, weight_sum, bias)
        return _result(gluon().multiply_gated(activation, layer, y_dtype, static, entries, design), entries)
    design = fitting(design, (codes, None, halved), sm)
    y = empty((M, N), y_dtype, codes.device)
    tiles = cdiv(M, design.BLOCK_M) * cdiv(N, design.BLOCK_N // 2)
    strides = (codes.stride(0), halved.stride(1))
    if design.tma:
        codes = describe(codes, [design.BLOCK_M, design.BLOCK_K])
        halved = describe(halved, [2, design.BLOCK_N // 2, design.BLOCK_K])
    constants = design_constants(design, dtype, sm)
    del constants["SPLIT_K"], constants["PERSISTENT"]
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
    return _result(y, entries)


def _result(y: Tensor, entries: ScaleEntries | None) -> Tensor | QuantizedActivation:
    return y if entries is None else QuantizedActivation(y, entries.scale, entries.zero_point, entries.rows_per_scale)


def geglu_design(M: int, N: int, K: int, sm: int, dtype: torch.dtype = torch.int8) -> Design:
    """The table's design for this product, or for the same one without GEGLU, or the default; neither split nor persistent.

    N: rows of the weight, values and gates, of which a tile takes BLOCK_N. So its sums and operands cost as without GEGLU.
    """
    products = (Product(op, DTYPE_NAME[dtype], 1, M, N, K) for op in ("geglu", "gemm"))
    tuned = next((design for product in products if (design := tuned_design(sm, product)) is not None), None)
    return replace(tuned or default_gemm_design(sm, M, N), split_k=1, persistent=False)
