"""Triton kernels of quantize_image: extremes per slice of an image, scale per image, codes. Formula: ../quantize_image.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import FP8, QuantizedActivation
from ..quantize_image import check_images, check_low
from ..quantize_token import TINY
from ..repeat import empty, launch
from .launch import cdiv, on_device
from .quantize_static import pixel_strides, quantize_pixels
from .rounding import dynamic_scale, magnitude, range_scale, upper

BLOCK_P = 64
BLOCK_C = 64
BLOCK_SLICES = 256


@triton.jit
def _slice_absmax_kernel(
    x_ptr, absmax_ptr,
    P, C, stride_xb, stride_xp, stride_xc,
    HAS_LOW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """absmax[image, slice] over all channels of BLOCK_P pixels; HAS_LOW: the largest value, or 0, instead."""
    image = tl.program_id(1).to(tl.int64)
    pixels = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = tl.arange(0, BLOCK_C)
    inside_p = pixels[:, None] < P
    x_ptrs = x_ptr + image * stride_xb + pixels[:, None] * stride_xp + channels[None, :].to(tl.int64) * stride_xc
    absmax = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for c in range(0, C, BLOCK_C):
        x = tl.load(x_ptrs, mask=inside_p & (channels[None, :] < C - c), other=0.0)
        absmax = tl.maximum(absmax, upper(x) if HAS_LOW else magnitude(x))
        x_ptrs += BLOCK_C * stride_xc
    slice_absmax = tl.max(tl.max(absmax, axis=1), axis=0)
    tl.store(absmax_ptr + image * tl.num_programs(0) + tl.program_id(0), slice_absmax)


@triton.jit
def _image_scale_kernel(
    absmax_ptr, scale_ptr, zero_point_ptr, slices,
    LOW: tl.constexpr, TINY: tl.constexpr, IS_FP8: tl.constexpr, BLOCK_SLICES: tl.constexpr,
):  # fmt: skip
    """Symmetric where LOW is None; else of [LOW, largest value], with a zero point."""
    image = tl.program_id(0)
    offsets = tl.arange(0, BLOCK_SLICES)
    absmax = tl.zeros((BLOCK_SLICES,), tl.float32)
    for start in range(0, slices, BLOCK_SLICES):
        absmax = tl.maximum(absmax, tl.load(absmax_ptr + image * slices + start + offsets, mask=offsets < slices - start, other=0.0))
    if LOW is None:
        CODES: tl.constexpr = tl.float8e4nv if IS_FP8 else tl.int8
        tl.store(scale_ptr + image, dynamic_scale(tl.max(absmax, axis=0), TINY, CODES))
    else:
        scale, zero_point = range_scale(tl.max(absmax, axis=0), LOW)
        tl.store(scale_ptr + image, scale)
        tl.store(zero_point_ptr + image, zero_point)


def image_absmax(x: Tensor, largest: bool = False) -> Tensor:
    """(B, slices) fp32: absmax of every BLOCK_P pixels of x (B, C, H, W), in pixel_strides' layout; or their largest value, or 0."""
    B, C, H, W = x.shape
    slices = cdiv(H * W, BLOCK_P)
    absmax = empty((B, slices), torch.float32, x.device)
    launch(
        _slice_absmax_kernel, (slices, B),
        x, absmax, H * W, C, x.stride(0), pixel_strides(x)[1], x.stride(1),
        HAS_LOW=largest, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=8,
    )  # fmt: skip
    return absmax


def quantize_image(x: Tensor, low: float | None = None, dtype: torch.dtype = torch.int8) -> QuantizedActivation:
    """See quantize_image_ref, whose codes, scales and zero points these are, bit for bit."""
    check_images(x, "quantize_image")
    check_low(low, dtype)
    x = pixel_strides(x)[0]
    B, _, H, W = x.shape
    scale = empty((B,), torch.float32, x.device)
    zero_point = None if low is None else empty((B,), torch.int32, x.device)
    with on_device(x):
        absmax = image_absmax(x, low is not None)
        launch(
            _image_scale_kernel, (B,),
            absmax, scale, zero_point, absmax.shape[1], LOW=low, TINY=TINY, IS_FP8=dtype is FP8, BLOCK_SLICES=BLOCK_SLICES, num_warps=1,
        )  # fmt: skip
    return quantize_pixels(x, scale, zero_point, H * W, dtype)
