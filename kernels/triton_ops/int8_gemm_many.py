"""Kernel and launcher of int8_gemm_many, and of fp8_gemm_many: each output tile is of one of up to three weights. See there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..design import Design
from ..finish import Finish
from ..int8_gemm_many import MAX_WEIGHTS, LinearWeight, checked_weights
from ..repeat import empty, launch
from .accumulate import add_from_descriptors, chosen, gemm_from_pointers, tile_position
from .epilogue import in_parts
from .gemm_kernel import finish_columns
from .int8_gemm import design_constants, divides_k, fitting, gemm_design, k_contiguous, launch_gemm, serves_gluon
from .launch import cdiv, compute_capability, describe, gluon, on_device

# Sizes whose value or divisibility must not make another compiled kernel: none of them is a stride.
RUNTIME_ONLY = ["M", "has_bias", "rows_per_scale"]


@triton.jit
def _sums_of_one(
    codes, qweight_1, qweight_2, qweight_3, which, first_m, first_n, local_m, local_n, inside_m, K, stride_am, stride_wn,
    TMA: tl.constexpr, ACC: tl.constexpr, EVEN_K: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if TMA:
        # Descriptors are launch arguments and cannot be chosen by value. Of three loops two are empty; branches around them
        # would keep two loops' shared memory, and one program on a multiprocessor instead of two.
        m, n = first_m.to(tl.int32), first_n.to(tl.int32)
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        acc = add_from_descriptors(acc, codes, qweight_1, m, n, 0, 0, tl.where(which == 0, K, 0), ACC, BLOCK_K)
        acc = add_from_descriptors(acc, codes, qweight_2, m, n, 0, 0, tl.where(which == 1, K, 0), ACC, BLOCK_K)
        acc = add_from_descriptors(acc, codes, qweight_3, m, n, 0, 0, tl.where(which == 2, K, 0), ACC, BLOCK_K)
    else:
        qweight = chosen(which, qweight_1, qweight_2, qweight_3)
        acc = gemm_from_pointers(
            codes + first_m * stride_am, qweight + first_n * stride_wn, local_m, local_n, inside_m, local_n < BLOCK_N,
            K, 0, K, stride_am, stride_wn, ACC, EVEN_K, UNROLL, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _gemm_many_kernel(
    codes, qweight_1, qweight_2, qweight_3, y_ptr, scale_ptr, zero_point_ptr,
    weight_scale_1_ptr, weight_scale_2_ptr, weight_scale_3_ptr, weight_sum_1_ptr, weight_sum_2_ptr, weight_sum_3_ptr,
    bias_1_ptr, bias_2_ptr, bias_3_ptr, has_bias,
    M, N, N_all, K, stride_am, stride_wn, rows_per_scale,
    TMA: tl.constexpr, ACC: tl.constexpr, EVEN_K: tl.constexpr, UNROLL: tl.constexpr, PARTS: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """codes and qweights are pointers, or descriptors if TMA. BLOCK_N divides N, so that no tile has columns of two weights."""
    tile_m, tile_n = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N_all, BLOCK_N), GROUP_M)
    which = tile_n // (N // BLOCK_N)
    # 64 bit for the tile's corner only, as in gemm_kernel.py.
    first_m = tile_m.to(tl.int64) * BLOCK_M
    first_n = tile_n.to(tl.int64) * BLOCK_N
    local_m = tl.arange(0, BLOCK_M)
    acc = _sums_of_one(
        codes, qweight_1, qweight_2, qweight_3, which, first_m, first_n - which * N, local_m, tl.arange(0, BLOCK_N),
        local_m < M - first_m, K, stride_am, stride_wn, TMA, ACC, EVEN_K, UNROLL, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    # Moved back, so that columns count through all weights, as they do in y.
    weight_scale_ptr = chosen(which, weight_scale_1_ptr, weight_scale_2_ptr, weight_scale_3_ptr) - which * N
    bias_ptr = chosen(which, bias_1_ptr, bias_2_ptr, bias_3_ptr) - which * N
    weight_sum_ptr = None
    if zero_point_ptr is not None:
        weight_sum_ptr = chosen(which, weight_sum_1_ptr, weight_sum_2_ptr, weight_sum_3_ptr) - which * N
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    parts = in_parts(acc, PARTS, BLOCK_M, BLOCK_N)
    for part in tl.static_range(PARTS):
        finish_columns(
            parts[part], None, first_m, first_n + part * WIDTH, M, N_all, y_ptr,
            scale_ptr, zero_point_ptr, None, None, weight_scale_ptr, weight_sum_ptr, bias_ptr, has_bias, None, None, None,
            rows_per_scale, 1, 1, 1, BLOCK_M, WIDTH,
        )  # fmt: skip


def int8_gemm_many(
    activation: QuantizedActivation, weights: Sequence[Sequence[Tensor | None]], out_dtype: torch.dtype = torch.float16
) -> list[Tensor]:
    """See int8_gemm_many_ref; views of one (M, 3N) tensor, or a launch for each weight where tiles do not divide N."""
    return launch_gemm_many(activation, checked_weights(activation, weights), out_dtype)


def launch_gemm_many(activation: QuantizedActivation, layers: list[LinearWeight], out_dtype: torch.dtype) -> list[Tensor]:
    """int8_gemm_many of operands that have been checked."""
    qweights = [k_contiguous(layer.qweight) for layer in layers]
    codes = k_contiguous(activation.codes)
    sm = compute_capability(codes.device)
    count, N = len(layers), qweights[0].shape[0]
    design = gemm_design(codes, None, count * N, sm)
    if N % design.columns == 0 and serves_gluon(design, activation, qweights, (out_dtype,), N * out_dtype.itemsize, sm):
        return list(gluon().multiply(activation, layers, out_dtype, None, design).split(N, 1))
    design = fitting(replace(design, split_k=1, persistent=False), (codes, None, *qweights), sm)
    if N % design.BLOCK_N or len({qweight.stride(0) for qweight in qweights}) > 1:
        return [launch_gemm(activation, None, *layer, out_dtype, Finish()) for layer in layers]
    y = _launch(activation, codes, layers, qweights, design, out_dtype, sm)
    return list(y.split(N, 1))


def _launch(
    activation: QuantizedActivation,
    codes: Tensor,
    layers: list[LinearWeight],
    qweights: list[Tensor],
    design: Design,
    out_dtype: torch.dtype,
    sm: int,
) -> Tensor:
    """(M, count * N) in one launch."""
    (M, K), N, dtype = codes.shape, qweights[0].shape[0], codes.dtype
    N_all = len(layers) * N
    y = empty((M, N_all), out_dtype, codes.device)
    strides = (codes.stride(0), qweights[0].stride(0))
    # No tile asks for a weight that is not there; its place is taken by the last.
    repeated = [*layers, *[layers[-1]] * (MAX_WEIGHTS - len(layers))]
    if design.tma:
        codes = describe(codes, [design.BLOCK_M, design.BLOCK_K])
        qweights = [describe(qweight, [design.BLOCK_N, design.BLOCK_K]) for qweight in qweights]
    qweights = [*qweights, *[qweights[-1]] * (MAX_WEIGHTS - len(qweights))]
    has_bias = layers[0].bias is not None
    constants = design_constants(design, dtype, sm)
    del constants["SPLIT_K"], constants["PERSISTENT"]
    with on_device(y):
        launch(
            _gemm_many_kernel, (cdiv(M, design.BLOCK_M) * (N_all // design.BLOCK_N),),
            codes, *qweights, y, activation.scale, activation.zero_point,
            *(layer.weight_scale for layer in repeated),
            *(layer.weight_sum if activation.zero_point is not None else None for layer in repeated),
            *(layer.bias if has_bias else y for layer in repeated), int(has_bias),
            M, N, N_all, K, *strides, activation.rows_per_scale,
            EVEN_K=divides_k(design, K), **constants,
        )  # fmt: skip
    return y
