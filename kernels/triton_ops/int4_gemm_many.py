"""Kernel and launcher of int4_gemm_many: one launch, each output tile of one of up to three weights. See ../int4_gemm_many.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..design import EXPANDED, Design
from ..finish import Finish
from ..int4_gemm_many import Int4LinearWeight, checked_int4_weights
from ..int8_gemm_many import MAX_WEIGHTS, LinearWeight
from ..repeat import empty, launch
from .accumulate import chosen, tile_position
from .int4_accumulate import int4_sums_from_pointers
from .int4_expand import expanded
from .int4_gemm import finish_transposed, int4_constants, int4_design, launch_int4_gemm
from .int8_gemm import k_contiguous
from .int8_gemm_many import launch_gemm_many
from .launch import cdiv, compute_capability, on_device

# Sizes whose value or divisibility must not make another compiled kernel: none of them is a stride.
RUNTIME_ONLY = ["M", "has_bias", "rows_per_scale"]


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _int4_gemm_many_kernel(
    codes, qweight_1, qweight_2, qweight_3, group_scale_1, group_scale_2, group_scale_3, y_ptr, scale_ptr, zero_point_ptr,
    weight_scale_1_ptr, weight_scale_2_ptr, weight_scale_3_ptr, weight_sum_1_ptr, weight_sum_2_ptr, weight_sum_3_ptr,
    bias_1_ptr, bias_2_ptr, bias_3_ptr, has_bias,
    M, N, N_all, K, stride_xm, stride_wn, rows_per_scale,
    ASM: tl.constexpr, EVEN_K: tl.constexpr, PARTS: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N divides N, so that no tile has columns of two weights."""
    tile_m, tile_n = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N_all, BLOCK_N), GROUP_M)
    which = tile_n // (N // BLOCK_N)
    # 64 bit for the tile's corner only, as in gemm_kernel.py.
    first_m = tile_m.to(tl.int64) * BLOCK_M
    first_n = tile_n.to(tl.int64) * BLOCK_N
    own_n = first_n - which * N
    local_n = tl.arange(0, BLOCK_N)
    acc = int4_sums_from_pointers(
        codes, chosen(which, qweight_1, qweight_2, qweight_3) + own_n * stride_wn,
        chosen(which, group_scale_1, group_scale_2, group_scale_3) + own_n, local_n, local_n < BLOCK_N, first_m, M, N, K,
        stride_xm, stride_wn, ASM, EVEN_K, BLOCK_M, BLOCK_N, GROUP,
    )  # fmt: skip
    # Moved back, so that columns count through all weights, as they do in y.
    weight_scale_ptr = chosen(which, weight_scale_1_ptr, weight_scale_2_ptr, weight_scale_3_ptr) - which * N
    bias_ptr = chosen(which, bias_1_ptr, bias_2_ptr, bias_3_ptr) - which * N
    weight_sum_ptr = None
    if zero_point_ptr is not None:
        weight_sum_ptr = chosen(which, weight_sum_1_ptr, weight_sum_2_ptr, weight_sum_3_ptr) - which * N
    finish_transposed(
        acc, first_m, first_n, M, N_all, y_ptr, scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, has_bias,
        None, None, None, rows_per_scale, 1, 1, PARTS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def int4_gemm_many(
    activation: QuantizedActivation, weights: Sequence[Sequence[Tensor | None]], out_dtype: torch.dtype = torch.float16
) -> list[Tensor]:
    """See int4_gemm_many_ref; views of one (M, 3N) tensor, or a launch for each weight where tiles do not divide N."""
    layers = [layer._replace(qweight=k_contiguous(layer.qweight)) for layer in checked_int4_weights(activation, weights)]
    codes = k_contiguous(activation.codes)
    (M, K), N, sm = codes.shape, layers[0].qweight.shape[0], compute_capability(codes.device)
    design = int4_design("gemm", M, len(layers) * N, K, sm)
    if len({layer.qweight.stride(0) for layer in layers}) > 1 or (design.backend != EXPANDED and N % design.BLOCK_N):
        return [launch_int4_gemm(activation, *layer, out_dtype, Finish()) for layer in layers]
    if design.backend == EXPANDED:
        int8 = expanded([layer.qweight for layer in layers], [layer.group_scale for layer in layers], K)
        expanded_layers = [LinearWeight(own, *layer[2:]) for own, layer in zip(int8, layers, strict=True)]
        return launch_gemm_many(activation, expanded_layers, out_dtype)
    y = _launch(activation, codes, layers, design, out_dtype, sm)
    return list(y.split(N, 1))


def _launch(
    activation: QuantizedActivation, codes: Tensor, layers: list[Int4LinearWeight], design: Design, out_dtype: torch.dtype, sm: int
) -> Tensor:
    """(M, count * N) in one launch."""
    (M, K), N = codes.shape, layers[0].qweight.shape[0]
    N_all = len(layers) * N
    y = empty((M, N_all), out_dtype, codes.device)
    # No tile asks for a weight that is not there; its place is taken by the last.
    repeated = [*layers, *[layers[-1]] * (MAX_WEIGHTS - len(layers))]
    has_bias = layers[0].bias is not None
    with on_device(y):
        launch(
            _int4_gemm_many_kernel, (cdiv(M, design.BLOCK_M) * (N_all // design.BLOCK_N),),
            codes, *(layer.qweight for layer in repeated), *(layer.group_scale for layer in repeated),
            y, activation.scale, activation.zero_point,
            *(layer.weight_scale for layer in repeated),
            *(layer.weight_sum if activation.zero_point is not None else None for layer in repeated),
            *(layer.bias if has_bias else y for layer in repeated), int(has_bias),
            M, N, N_all, K, codes.stride(0), layers[0].qweight.stride(0), activation.rows_per_scale,
            **int4_constants(replace(design, tma=False), K, sm),
        )  # fmt: skip
    return y
