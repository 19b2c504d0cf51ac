"""Triton kernel of channel_group_gemm. Formula: ../channel_group_gemm.py; sums: channel_group_accumulate.py."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..channel_group import ChannelGroups
from ..channel_group_gemm import channel_group_gemm_ref, check_grouped_gemm
from ..design import Design
from ..repeat import empty, launch
from .accumulate import tile_position
from .channel_group_accumulate import grouped_gemm_from_descriptors, grouped_gemm_from_pointers
from .epilogue import in_parts
from .gemm_kernel import finish_columns
from .int8_gemm import divides_k, epilogue_parts, fitting, gemm_design, k_contiguous, optional_bias, register_limit
from .launch import cdiv, compute_capability, describe, on_device, unroll_factor

RUNTIME_ONLY = ["M", "has_bias", "rows_per_scale"]


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _channel_group_gemm_kernel(
    codes, qweight, y_ptr, ends_ptr, shifts_ptr, scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr,
    bias_ptr, has_bias, M, N, K, stride_am, stride_wn, rows_per_scale,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, UNROLL: tl.constexpr, PARTS: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One output tile. codes and qweight are pointers, or descriptors if TMA."""
    tile_m, tile_n = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    first_m = tile_m.to(tl.int64) * BLOCK_M
    first_n = tile_n.to(tl.int64) * BLOCK_N
    if TMA:
        acc = grouped_gemm_from_descriptors(
            codes, qweight, first_m.to(tl.int32), first_n.to(tl.int32), ends_ptr, shifts_ptr, K, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        local_m = tl.arange(0, BLOCK_M)
        local_n = tl.arange(0, BLOCK_N)
        acc = grouped_gemm_from_pointers(
            codes + first_m * stride_am, qweight + first_n * stride_wn, local_m, local_n, local_m < M - first_m, local_n < N - first_n,
            ends_ptr, shifts_ptr, K, stride_am, stride_wn, EVEN_K, UNROLL, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    parts = in_parts(acc, PARTS, BLOCK_M, BLOCK_N)
    for part in tl.static_range(PARTS):
        finish_columns(
            parts[part], None, first_m, first_n + part * WIDTH, M, N, y_ptr,
            scale_ptr, zero_point_ptr, None, None, weight_scale_ptr, weight_sum_ptr, bias_ptr, has_bias, None, None, None,
            rows_per_scale, 1, 1, 1, BLOCK_M, WIDTH,
        )  # fmt: skip


def channel_group_gemm(
    activation: QuantizedActivation,
    groups: ChannelGroups,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """See channel_group_gemm_ref; the integer sums are the same, the scaling may round differently. Finer groups run there."""
    if groups.needs_reference():
        return channel_group_gemm_ref(activation, groups, qweight, weight_scale, weight_sum, bias, out_dtype)
    check_grouped_gemm(activation, groups, qweight, weight_scale, weight_sum, bias)
    codes, qweight = k_contiguous(activation.codes), k_contiguous(qweight)
    (M, K), N, sm = codes.shape, qweight.shape[0], compute_capability(codes.device)
    design = grouped_design(fitting(gemm_design(codes, None, N, sm), (codes, None, qweight), sm), groups)
    y = empty((M, N), out_dtype, codes.device)
    strides = (codes.stride(0), qweight.stride(0))
    a, w = codes, qweight
    if design.tma:
        a, w = describe(codes, [design.BLOCK_M, design.BLOCK_K]), describe(qweight, [design.BLOCK_N, design.BLOCK_K])
    with on_device(y):
        launch(
            _channel_group_gemm_kernel, (cdiv(M, design.BLOCK_M) * cdiv(N, design.BLOCK_N),),
            a, w, y, groups.ends, groups.shifts, activation.scale, activation.zero_point, weight_scale, weight_sum,
            *optional_bias(bias, y), M, N, K, *strides, activation.rows_per_scale,
            EVEN_K=divides_k(design, K), **grouped_constants(design, sm),
        )  # fmt: skip
    return y


def grouped_design(design: Design, groups: ChannelGroups) -> Design:
    """The design with a step along K that ends at every border. One program makes one whole tile."""
    return replace(design, BLOCK_K=min(design.BLOCK_K, groups.granularity), split_k=1, persistent=False)


def grouped_constants(design: Design, sm: int) -> dict[str, int | bool]:
    """The kernels' constants and launch options that follow from the design."""
    return register_limit(design, sm, 1) | {
        "TMA": design.tma,
        "UNROLL": unroll_factor(sm),
        "PARTS": epilogue_parts(design),
        "GROUP_M": design.group_m,
        "BLOCK_M": design.BLOCK_M,
        "BLOCK_N": design.BLOCK_N,
        "BLOCK_K": design.BLOCK_K,
        "num_warps": design.num_warps,
        "num_stages": design.num_stages,
    }
