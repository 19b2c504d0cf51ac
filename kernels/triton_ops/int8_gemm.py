"""Triton kernel of int8_gemm: one program makes one output tile. Formula: ../int8_gemm.py. No split-K."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..int8_gemm import check_gemm
from .launch import compute_capability, on_device, unroll_factor
from .tiles import GROUP_M, gemm_tile


@triton.jit
def tile_position(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of this program's tile: column by column within groups of GROUP_M rows of tiles."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first_m = program // (GROUP_M * tiles_n) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return first_m + within % group_m, within // group_m


@triton.jit
def _int8_gemm_kernel(
    codes_ptr, qweight_ptr, y_ptr,
    scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr,
    M, N, K, stride_am, stride_wn, rows_per_scale,
    HAS_ZERO_POINT: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_position(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    # 64 bit for the tile's corner only: offsets within a tile fit 32 bit, and a batch may pass 2^31 elements.
    first_m = tile_m.to(tl.int64) * BLOCK_M
    first_n = tile_n.to(tl.int64) * BLOCK_N
    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    inside_m = local_m < M - first_m
    inside_n = local_n < N - first_n
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = codes_ptr + first_m * stride_am + local_m[:, None] * stride_am + ks[None, :]
    w_ptrs = qweight_ptr + first_n * stride_wn + local_n[None, :] * stride_wn + ks[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in tl.range(0, K, BLOCK_K, loop_unroll_factor=UNROLL):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=inside_m[:, None], other=0)
            w = tl.load(w_ptrs, mask=inside_n[None, :], other=0)
        else:
            a = tl.load(a_ptrs, mask=inside_m[:, None] & (ks[None, :] < K - k), other=0)
            w = tl.load(w_ptrs, mask=inside_n[None, :] & (ks[:, None] < K - k), other=0)
        acc = tl.dot(a, w, acc, out_dtype=tl.int32)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    entry = (first_m + local_m) // rows_per_scale
    if HAS_ZERO_POINT:
        zero_point = tl.load(zero_point_ptr + entry, mask=inside_m, other=0)
        weight_sum = tl.load(weight_sum_ptr + first_n + local_n, mask=inside_n, other=0)
        acc -= zero_point[:, None] * weight_sum[None, :]
    scale = tl.load(scale_ptr + entry, mask=inside_m, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + first_n + local_n, mask=inside_n, other=0.0)
    y = acc.to(tl.float32) * (scale[:, None] * weight_scale[None, :])
    if HAS_BIAS:
        y += tl.load(bias_ptr + first_n + local_n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + first_m * N + first_n + local_m[:, None] * N + local_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])


def int8_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """See int8_gemm_ref; the integer sums are the same, the scaling may round differently."""
    check_gemm(activation, qweight, weight_scale, weight_sum, bias)
    codes = activation.codes
    if codes.stride(1) != 1:
        codes = codes.contiguous()
    if qweight.stride(1) != 1:
        qweight = qweight.contiguous()
    (M, K), N = codes.shape, qweight.shape[0]
    y = torch.empty((M, N), dtype=out_dtype, device=codes.device)
    sm = compute_capability(codes.device)
    tile = gemm_tile(sm, M, N)
    has_zero_point = activation.zero_point is not None
    with on_device(codes):
        _int8_gemm_kernel[(triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(N, tile.BLOCK_N),)](
            codes, qweight, y,
            activation.scale, activation.zero_point if has_zero_point else activation.scale,
            weight_scale, weight_sum if has_zero_point else weight_scale, weight_scale if bias is None else bias,
            M, N, K, codes.stride(0), qweight.stride(0), activation.rows_per_scale,
            HAS_ZERO_POINT=has_zero_point, HAS_BIAS=bias is not None,
            EVEN_K=K % tile.BLOCK_K == 0, UNROLL=unroll_factor(sm),
            BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K, GROUP_M=GROUP_M,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y
