"""Kernel and launcher of int4_geglu_gemm: as int4_gemm.py; half of the rows of a weight tile are values, half their gates."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..design import EXPANDED
from ..int4_geglu_gemm import OPERATION, check_int4_geglu_gemm
from ..repeat import empty, launch
from ..static_scale import StaticScale
from .accumulate import tile_position
from .gated_epilogue import store_gated
from .int4_accumulate import int4_sums_from_pointers
from .int4_expand import expanded
from .int4_gemm import int4_constants, int4_design
from .int8_geglu_gemm import launch_geglu_gemm
from .int8_gemm import k_contiguous, optional_bias
from .launch import cdiv, compute_capability, on_device
from .scale_entries import scale_entries

# Sizes whose value or divisibility must not make another compiled kernel: none of them is a stride.
RUNTIME_ONLY = ["M", "has_bias", "rows_per_scale", "rows_per_entry"]


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _int4_geglu_gemm_kernel(
    codes, qweight, group_scale_ptr, y_ptr,
    scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, has_bias,
    table_ptr, zero_table_ptr, bucket_ptr, out_scale_ptr, out_zero_point_ptr, clipped_ptr,
    M, N, K, stride_xm, stride_wn, rows_per_scale, rows_per_entry,
    ASM: tl.constexpr, EVEN_K: tl.constexpr, PARTS: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One output tile of BLOCK_N / 2 columns. N counts the values. Tables and what is stored: see store_gated."""
    HALF: tl.constexpr = BLOCK_N // 2
    tile_m, tile_n = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, HALF), GROUP_M)
    # 64 bit for the tile's corner only, as in gemm_kernel.py.
    first_m = tile_m.to(tl.int64) * BLOCK_M
    first_n = tile_n.to(tl.int64) * HALF
    local_n = tl.arange(0, BLOCK_N)
    acc = int4_sums_from_pointers(
        codes, qweight + first_n * stride_wn, group_scale_ptr + first_n, local_n % HALF + local_n // HALF * N,
        local_n % HALF < N - first_n, first_m, M, 2 * N, K, stride_xm, stride_wn, ASM, EVEN_K, BLOCK_M, BLOCK_N, GROUP,
    )  # fmt: skip
    store_gated(
        acc.T, y_ptr, tile_m, tile_n, first_m, first_n, scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, has_bias,
        table_ptr, zero_table_ptr, bucket_ptr, out_scale_ptr, out_zero_point_ptr, clipped_ptr, M, N, rows_per_scale, rows_per_entry,
        PARTS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def int4_geglu_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    static: StaticScale | None = None,
) -> Tensor | QuantizedActivation:
    """See int4_geglu_gemm_ref: the integer sums are the same, GELU is within 3e-5 (gelu_erf), codes at most 1 apart."""
    check_int4_geglu_gemm(activation, qweight, group_scale, weight_scale, weight_sum, bias, static)
    codes, qweight = k_contiguous(activation.codes), k_contiguous(qweight)
    (M, K), N, sm = codes.shape, qweight.shape[0] // 2, compute_capability(codes.device)
    design = int4_design("geglu", M, 2 * N, K, sm)
    if design.backend == EXPANDED:
        (int8,) = expanded([qweight], [group_scale], K)
        return launch_geglu_gemm(activation, int8, weight_scale, weight_sum, bias, out_dtype, static)
    y = empty((M, N), out_dtype if static is None else torch.int8, codes.device)
    entries, out = None, (None,) * 6
    if static is not None:
        entries = scale_entries(OPERATION, static, M, M, M, y.device)
        out = (static.scale, static.zero_point, static.bucket, entries.scale, entries.zero_point, static.clipped)
    constants = int4_constants(replace(design, tma=False), K, sm)
    constants["PARTS"] = max(1, constants["PARTS"] // 2)  # values and gates of a part are as many sums as two parts elsewhere
    with on_device(y):
        launch(
            _int4_geglu_gemm_kernel, (cdiv(M, design.BLOCK_M) * cdiv(N, design.BLOCK_N // 2),),
            codes, qweight, group_scale, y, activation.scale, activation.zero_point,
            weight_scale, weight_sum if activation.zero_point is not None else None, *optional_bias(bias, y), *out,
            M, N, K, codes.stride(0), qweight.stride(0), activation.rows_per_scale, 1 if entries is None else entries.rows_per_scale,
            **constants,
        )  # fmt: skip
    return y if entries is None else QuantizedActivation(y, entries.scale, entries.zero_point, entries.rows_per_scale)
