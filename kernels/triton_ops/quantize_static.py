"""Triton kernel of quantize_static, also the second half of quantize_image. Formula: ../quantize_static.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..quantize_static import gather_buckets
from .launch import on_device
from .rounding import round_half_even

BLOCK_P = 32
BLOCK_C = 128


@triton.jit
def _quantize_static_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_point_ptr,
    P, C, rows_per_scale, stride_xb, stride_xp, stride_xc,
    HAS_ZERO_POINT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    pixels = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_p = pixels < P
    inside = inside_p[:, None] & (channels[None, :] < C)
    x_ptrs = x_ptr + image * stride_xb + pixels[:, None] * stride_xp + channels[None, :].to(tl.int64) * stride_xc
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)

    rows = image * P + pixels
    entry = rows // rows_per_scale
    scale = tl.load(scale_ptr + entry, mask=inside_p, other=1.0)
    codes = round_half_even(tl.div_rn(x, tl.broadcast_to(scale[:, None], (BLOCK_P, BLOCK_C))))
    if HAS_ZERO_POINT:
        codes += tl.load(zero_point_ptr + entry, mask=inside_p, other=0)[:, None]
        codes = tl.maximum(codes, -128)
    else:
        codes = tl.maximum(codes, -127)
    codes = tl.minimum(codes, 127)
    tl.store(codes_ptr + rows[:, None] * C + channels[None, :], codes.to(tl.int8), mask=inside)


def pixel_strides(x: Tensor) -> tuple[Tensor, int]:
    """(B, C, H, W) -> x or a channels_last copy of it, and the distance of neighbouring pixels in row order.

    NCHW and channels_last have one such distance; a crop has not and is copied.
    """
    _, _, H, W = x.shape
    if H > 1 and W > 1 and x.stride(2) != W * x.stride(3):
        x = x.contiguous(memory_format=torch.channels_last)
    return x, x.stride(3) if W > 1 else x.stride(2)


def quantize_pixels(x: Tensor, scale: Tensor, zero_point: Tensor | None, rows_per_scale: int) -> QuantizedActivation:
    """Quantize x (M, K) or (B, C, H, W) with scale and zero_point (S,), one entry per rows_per_scale rows."""
    if x.ndim == 4:
        B, C, H, W = x.shape
        x, stride_p = pixel_strides(x)
        P, stride_b, stride_c, shape = H * W, x.stride(0), x.stride(1), (B, H, W, C)
    else:
        (P, C), B, shape = x.shape, 1, tuple(x.shape)
        stride_b, stride_p, stride_c = 0, x.stride(0), x.stride(1)
    codes = torch.empty(shape, dtype=torch.int8, device=x.device)
    with on_device(x):
        _quantize_static_kernel[(triton.cdiv(P, BLOCK_P), triton.cdiv(C, BLOCK_C), B)](
            x, codes, scale, scale if zero_point is None else zero_point,
            P, C, rows_per_scale, stride_b, stride_p, stride_c,
            HAS_ZERO_POINT=zero_point is not None, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
    return QuantizedActivation(codes, scale, zero_point, rows_per_scale)


def quantize_static(x: Tensor, scale: Tensor, zero_point: Tensor | None, bucket: Tensor) -> QuantizedActivation:
    """See quantize_static_ref, whose codes these are, bit for bit."""
    scale, zero_point, rows_per_scale = gather_buckets(x, scale, zero_point, bucket)
    return quantize_pixels(x, scale, zero_point, rows_per_scale)
