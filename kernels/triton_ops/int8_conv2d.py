"""Triton kernel of int8_conv2d: implicit GEMM over NHWC, K in the order (tap, channel). Formula: ../int8_conv2d.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..int8_conv2d import check_conv, output_side
from .int8_gemm import tile_position
from .launch import compute_capability, on_device, unroll_factor
from .tiles import GROUP_M, conv_tile


@triton.jit
def _int8_conv2d_kernel(
    codes_ptr, qweight_ptr, y_ptr,
    scale_ptr, zero_point_ptr, weight_scale_ptr, border_sums_ptr, bias_ptr,
    M, N, C, H, W, Ho, Wo, images_per_scale,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_C: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_position(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # output pixels of all images
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # output channels
    inside_m = rows < M
    inside_n = columns < N
    image = rows // (Ho * Wo)
    pixel = (rows % (Ho * Wo)).to(tl.int32)
    # The input pixel under the first tap; -1 in the padding.
    h = pixel // Wo * STRIDE - PADDING
    w = pixel % Wo * STRIDE - PADDING
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = codes_ptr + ((image * H + h) * W + w)[:, None] * C + ks[None, :]
    w_ptrs = qweight_ptr + columns[None, :].to(tl.int64) * (KERNEL * KERNEL * C) + ks[:, None]

    steps = tl.cdiv(C, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    # One flat loop, so that loads are pipelined across taps too.
    for step in tl.range(0, KERNEL * KERNEL * steps, loop_unroll_factor=UNROLL):
        tap = step // steps
        c = (step - tap * steps) * BLOCK_K
        tap_h = tap // KERNEL
        tap_w = tap - tap_h * KERNEL
        # Taps in the padding read code 0; what the zero point makes of that is put right below.
        mask_a = (inside_m & (h + tap_h >= 0) & (h + tap_h < H) & (w + tap_w >= 0) & (w + tap_w < W))[:, None]
        mask_w = inside_n[None, :]
        if not EVEN_C:
            mask_a = mask_a & (ks[None, :] < C - c)
            mask_w = mask_w & (ks[:, None] < C - c)
        a = tl.load(a_ptrs + ((tap_h * W + tap_w) * C + c), mask=mask_a, other=0)
        b = tl.load(w_ptrs + (tap * C + c), mask=mask_w, other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)

    entry = image // images_per_scale
    if HAS_ZERO_POINT:
        row_class = (h < 0).to(tl.int32) + 2 * (h + (KERNEL - 1) >= H).to(tl.int32)
        column_class = (w < 0).to(tl.int32) + 2 * (w + (KERNEL - 1) >= W).to(tl.int32)
        halo_ptrs = border_sums_ptr + (row_class * 4 + column_class)[:, None] * N + columns[None, :]
        halo = tl.load(halo_ptrs, mask=inside_m[:, None] & inside_n[None, :], other=0)
        acc -= tl.load(zero_point_ptr + entry, mask=inside_m, other=0)[:, None] * halo
    scale = tl.load(scale_ptr + entry, mask=inside_m, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + columns, mask=inside_n, other=0.0)
    y = acc.to(tl.float32) * (scale[:, None] * weight_scale[None, :])
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * N + columns[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])


def int8_conv2d(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    border_sums: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """See int8_conv2d_ref; the integer sums are the same, the scaling may round differently."""
    check_conv(activation, qweight, weight_scale, border_sums, bias, stride, padding)
    codes, qweight = activation.codes.contiguous(), qweight.contiguous()
    B, H, W, C = codes.shape
    Cout, kernel = qweight.shape[:2]
    Ho, Wo = output_side(H, kernel, stride, padding), output_side(W, kernel, stride, padding)
    y = torch.empty((B, Ho, Wo, Cout), dtype=out_dtype, device=codes.device)
    sm = compute_capability(codes.device)
    M = B * Ho * Wo
    tile = conv_tile(sm, M, Cout, C)
    has_zero_point = activation.zero_point is not None
    with on_device(codes):
        _int8_conv2d_kernel[(triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(Cout, tile.BLOCK_N),)](
            codes, qweight, y,
            activation.scale, activation.zero_point if has_zero_point else activation.scale,
            weight_scale, border_sums if has_zero_point else weight_scale, weight_scale if bias is None else bias,
            M, Cout, C, H, W, Ho, Wo, activation.rows_per_scale // (H * W),
            KERNEL=kernel, STRIDE=stride, PADDING=padding,
            HAS_ZERO_POINT=has_zero_point, HAS_BIAS=bias is not None,
            EVEN_C=C % tile.BLOCK_K == 0, UNROLL=unroll_factor(sm),
            BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K, GROUP_M=GROUP_M,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y.permute(0, 3, 1, 2)
