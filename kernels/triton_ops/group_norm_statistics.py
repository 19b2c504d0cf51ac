"""Triton kernels of GroupNorm's statistics: moments per channel and slice of pixels, then one affine map per image and channel.

Sums run in a fixed order, whatever the GPU: the same input gives the same bits. Normalising is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..group_norm_silu_quantize import GROUPS
from ..repeat import empty, launch
from .activations import silu_absmax
from .launch import cdiv
from .quantize_static import pixel_strides

BLOCK_P = 32
BLOCK_C = 64
BLOCK_SLICES = 16
# Slices per image, so that there are about as many programs as a large GPU runs at once, and few enough partial results.
TARGET_PROGRAMS = 640
MAX_SLICES = 64
# Channels of a group in one tile: SDXL's groups have 10 to 80, and each size more is a kernel more to compile.
LEAST_BLOCK_G = 64
MOMENTS = 4  # mean, sum of squared differences from it, lowest, highest


@triton.jit
def _channel_moments_kernel(
    x_ptr, moments_ptr,
    P, C, pixels_per_slice, C_total, channel_offset, stride_moment, stride_xb, stride_xp, stride_xc,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Four moments of every channel over one slice of one image's pixels."""
    image = tl.program_id(2).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = channels < C
    first = tl.program_id(0) * pixels_per_slice
    last = tl.minimum(first + pixels_per_slice, P)
    columns = x_ptr + image * stride_xb + channels.to(tl.int64) * stride_xc
    # Differences from one value of the channel: sums of x * x would cancel when the mean is large.
    shift = tl.load(columns + first.to(tl.int64) * stride_xp, mask=inside_c, other=0.0).to(tl.float32)

    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    lowest = total + shift[None, :]
    highest = lowest
    for p in range(first, last, BLOCK_P):
        pixels = p + tl.arange(0, BLOCK_P)
        inside = (pixels < last)[:, None] & inside_c[None, :]
        x = tl.load(columns[None, :] + pixels[:, None].to(tl.int64) * stride_xp, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x, shift[None, :])  # adds nothing to any of the four
        difference = x - shift[None, :]
        total += difference
        squares += difference * difference
        lowest = tl.minimum(lowest, x)
        highest = tl.maximum(highest, x)

    count = (last - first).to(tl.float32)
    mean = tl.sum(total, axis=0) / count
    squares_sum = tl.sum(squares, axis=0) - count * mean * mean
    squares_sum = tl.where(squares_sum < 0.0, 0.0, squares_sum)  # rounding; tl.maximum would hide a NaN
    out = moments_ptr + (image * tl.num_programs(0) + tl.program_id(0)) * C_total + channel_offset + channels
    tl.store(out, mean + shift, mask=inside_c)
    tl.store(out + stride_moment, squares_sum, mask=inside_c)
    tl.store(out + 2 * stride_moment, tl.min(lowest, axis=0), mask=inside_c)
    tl.store(out + 3 * stride_moment, tl.max(highest, axis=0), mask=inside_c)


@triton.jit(do_not_specialize=["slices", "channels_per_group"])
def _group_affine_kernel(
    moments_ptr, weight_ptr, bias_ptr, affine_ptr, absmax_ptr,
    P, C_total, slices, pixels_per_slice, channels_per_group, seam, stride_moment, stride_affine, eps,
    SILU: tl.constexpr, BOUND: tl.constexpr, BLOCK_SLICES: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """y = x * affine[0] + affine[1] for the channels of one group of one image; BOUND: and their activated_absmax per segment."""
    group = tl.program_id(0)
    image = tl.program_id(1)
    local = tl.arange(0, BLOCK_G)
    inside_c = local < channels_per_group
    channels = group * channels_per_group + local
    steps = tl.arange(0, BLOCK_SLICES)
    moments = moments_ptr + (image * slices + steps)[:, None] * C_total + channels[None, :]

    total = tl.zeros((BLOCK_SLICES, BLOCK_G), tl.float32)
    for s in range(0, slices, BLOCK_SLICES):
        inside = (steps < slices - s)[:, None] & inside_c[None, :]
        count = tl.minimum(P - (s + steps) * pixels_per_slice, pixels_per_slice).to(tl.float32)[:, None]
        total += count * tl.load(moments + s * C_total, mask=inside, other=0.0)
    size = 1.0 * P * channels_per_group
    mean = tl.sum(tl.sum(total, axis=1), axis=0) / size

    squares = tl.zeros((BLOCK_SLICES, BLOCK_G), tl.float32)
    lowest = tl.full((BLOCK_SLICES, BLOCK_G), float("inf"), tl.float32)
    highest = tl.full((BLOCK_SLICES, BLOCK_G), -float("inf"), tl.float32)
    for s in range(0, slices, BLOCK_SLICES):
        inside = (steps < slices - s)[:, None] & inside_c[None, :]
        count = tl.minimum(P - (s + steps) * pixels_per_slice, pixels_per_slice).to(tl.float32)[:, None]
        ptrs = moments + s * C_total
        difference = tl.load(ptrs, mask=inside, other=0.0) - mean
        squares += tl.where(inside, tl.load(ptrs + stride_moment, mask=inside, other=0.0) + count * difference * difference, 0.0)
        if BOUND:
            lowest = tl.minimum(lowest, tl.load(ptrs + 2 * stride_moment, mask=inside, other=float("inf")))
            highest = tl.maximum(highest, tl.load(ptrs + 3 * stride_moment, mask=inside, other=-float("inf")))
    variance = tl.sum(tl.sum(squares, axis=1), axis=0) / size

    factor = tl.load(weight_ptr + channels, mask=inside_c, other=0.0).to(tl.float32) / tl.sqrt_rn(variance + eps)
    offset = tl.load(bias_ptr + channels, mask=inside_c, other=0.0).to(tl.float32) - mean * factor
    tl.store(affine_ptr + image * C_total + channels, factor, mask=inside_c)
    tl.store(affine_ptr + stride_affine + image * C_total + channels, offset, mask=inside_c)
    if BOUND:
        one_end = tl.min(lowest, axis=0) * factor + offset
        other_end = tl.max(highest, axis=0) * factor + offset
        low, high = tl.minimum(one_end, other_end), tl.maximum(one_end, other_end)
        bound = silu_absmax(low, high) if SILU else tl.maximum(tl.abs(low), tl.abs(high))
        bound = tl.where((factor == factor) & (offset == offset), bound, float("inf"))  # maxima drop NaN
        absmax = absmax_ptr + image * 2 * tl.num_programs(0) + group
        tl.store(absmax, tl.max(tl.where(inside_c & (channels < seam), bound, 0.0), axis=0))
        tl.store(absmax + tl.num_programs(0), tl.max(tl.where(inside_c & (channels >= seam), bound, 0.0), axis=0))


@dataclass(frozen=True)
class GroupStatistics:
    """affine: (2, B, C) fp32, factor and offset. absmax: (B, 2, GROUPS) fp32 after SiLU, per segment; not set if not asked for."""

    affine: Tensor
    absmax: Tensor


def group_statistics(segments: Sequence[Tensor], weight: Tensor, bias: Tensor, eps: float, silu: bool, bound: bool) -> GroupStatistics:
    """Statistics of the segments' concatenation, (B, C_i, H, W) each with one distance between neighbouring pixels."""
    B, seam, H, W = segments[0].shape
    P, C = H * W, sum(x.shape[1] for x in segments)
    wanted = max(1, min(MAX_SLICES, TARGET_PROGRAMS // (B * cdiv(C, BLOCK_C))))
    pixels_per_slice = cdiv(cdiv(P, wanted), BLOCK_P) * BLOCK_P
    slices = cdiv(P, pixels_per_slice)
    moments = empty((MOMENTS, B, slices, C), torch.float32, weight.device)
    affine = empty((2, B, C), torch.float32, weight.device)
    absmax = empty((B, 2, GROUPS), torch.float32, weight.device)
    channel_offset = 0
    for x in segments:
        channels = x.shape[1]
        launch(
            _channel_moments_kernel, (slices, cdiv(channels, BLOCK_C), B),
            x, moments, P, channels, pixels_per_slice, C, channel_offset, moments.stride(0), x.stride(0), pixel_strides(x)[1], x.stride(1),
            BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
        channel_offset += channels
    launch(
        _group_affine_kernel, (GROUPS, B),
        moments, weight, bias, affine, absmax, P, C, slices, pixels_per_slice, C // GROUPS, seam, moments.stride(0), affine.stride(0), eps,
        SILU=silu, BOUND=bound, BLOCK_SLICES=BLOCK_SLICES, BLOCK_G=max(LEAST_BLOCK_G, triton.next_power_of_2(C // GROUPS)), num_warps=4,
    )  # fmt: skip
    return GroupStatistics(affine, absmax)
