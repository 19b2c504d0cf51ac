"""Triton kernel of quantize_pixel: extremes over a pixel's channels, then its codes; x is read twice. Formula: ../quantize_pixel.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..quantize_image import check_images, check_low
from ..quantize_token import TINY
from ..repeat import empty, launch
from .launch import cdiv, on_device
from .quantize_static import pixel_strides
from .rounding import dynamic_scale, magnitude, range_scale, round_half_even, upper

BLOCK_P = 16
BLOCK_C = 128


@triton.jit
def _quantize_pixel_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_point_ptr,
    P, C, stride_xb, stride_xp, stride_xc,
    LOW: tl.constexpr, TINY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_P pixels of one image. Symmetric where LOW is None."""
    image = tl.program_id(1).to(tl.int64)
    pixels = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = tl.arange(0, BLOCK_C)
    inside_p = pixels < P
    x_ptrs = x_ptr + image * stride_xb + pixels[:, None] * stride_xp + channels[None, :].to(tl.int64) * stride_xc
    largest = tl.zeros((BLOCK_P,), tl.float32)
    for c in range(0, C, BLOCK_C):
        inside = inside_p[:, None] & (channels[None, :] < C - c)
        x = tl.load(x_ptrs + c * stride_xc, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.max(magnitude(x) if LOW is None else upper(x), axis=1))
    rows = image * P + pixels
    if LOW is None:
        scale = dynamic_scale(largest, TINY)
    else:
        scale, zero_point = range_scale(largest, LOW)
        tl.store(zero_point_ptr + rows, zero_point, mask=inside_p)
    tl.store(scale_ptr + rows, scale, mask=inside_p)
    for c in range(0, C, BLOCK_C):
        inside = inside_p[:, None] & (channels[None, :] < C - c)
        x = tl.load(x_ptrs + c * stride_xc, mask=inside, other=0.0).to(tl.float32)
        codes = round_half_even(tl.div_rn(x, tl.broadcast_to(scale[:, None], (BLOCK_P, BLOCK_C))))
        codes = tl.maximum(codes, -127) if LOW is None else tl.maximum(codes + zero_point[:, None], -128)
        tl.store(codes_ptr + rows[:, None] * C + (c + channels)[None, :], tl.minimum(codes, 127).to(tl.int8), mask=inside)


def quantize_pixel(x: Tensor, low: float | None = None) -> QuantizedActivation:
    """See quantize_pixel_ref, whose codes, scales and zero points these are, bit for bit."""
    check_images(x, "quantize_pixel")
    check_low(low, "quantize_pixel")
    x, stride_p = pixel_strides(x)
    B, C, H, W = x.shape
    codes = empty((B, H, W, C), torch.int8, x.device)
    scale = empty((B * H * W,), torch.float32, x.device)
    zero_point = None if low is None else empty((B * H * W,), torch.int32, x.device)
    with on_device(x):
        launch(
            _quantize_pixel_kernel, (cdiv(H * W, BLOCK_P), B),
            x, codes, scale, zero_point, H * W, C, x.stride(0), stride_p, x.stride(1),
            LOW=low, TINY=TINY, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
    return QuantizedActivation(codes, scale, zero_point, 1)
