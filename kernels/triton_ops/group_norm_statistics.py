"""Triton kernels of GroupNorm's statistics: moments per channel and slice of pixels, then one affine map per image and channel.

Sums run in a fixed order, whatever the GPU: the same input gives the same bits. Normalising is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..group_norm_silu_quantize import GROUPS
from ..repeat import empty, launch
from .activations import silu, silu_absmax
from .launch import cdiv
from .quantize_static import pixel_strides

# One program reads BLOCK_P * STEPS pixels of BLOCK_C channels, all its loads on their way before the first sum: more at a time
# waits for memory once instead of eight times. Larger images take several such slices per program.
BLOCK_P = 32
STEPS = 8
BLOCK_C = 64
MAX_SLICES = 64
# Tiles of the second kernel, which holds a group's slices at once: (slices, channels). SDXL's groups have 10 to 80 channels;
# each size more is a kernel more to compile.
FEW_SLICES = 16
LEAST_BLOCK_G = 32
MOMENTS = 4  # mean, sum of squared differences from it, lowest, highest


class Bound(Enum):
    """What is found of every segment's normalised values, for its scale."""

    NONE = 0
    ABSMAX = 1  # of their activated_absmax
    LARGEST = 2  # of their activated_max


@triton.jit
def _load_pixels(ptrs, pixel, last, inside_c, stride_xp, BLOCK_P: tl.constexpr, EVEN: tl.constexpr):
    """fp32 (BLOCK_P, BLOCK_C) from pixel `pixel` on; 0 outside."""
    if EVEN:
        x = tl.load(ptrs + pixel.to(tl.int64) * stride_xp)
    else:
        inside = (tl.arange(0, BLOCK_P) < last - pixel)[:, None] & inside_c[None, :]
        x = tl.load(ptrs + pixel.to(tl.int64) * stride_xp, mask=inside, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _add_steps(
    ptrs, chunk, last, inside_c, stride_xp, shift, total, squares, lowest, highest,
    FIRST: tl.constexpr, BOUND: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums and ends with those of steps FIRST to STEPS from pixel `chunk` on."""
    for step in tl.static_range(FIRST, STEPS):
        pixel = chunk + step * BLOCK_P
        x = _load_pixels(ptrs, pixel, last, inside_c, stride_xp, BLOCK_P, EVEN)
        if not EVEN:
            x = tl.where((tl.arange(0, BLOCK_P) < last - pixel)[:, None], x, shift)  # adds nothing to any of the four
        difference = x - shift
        total += difference
        squares += difference * difference
        if BOUND:
            lowest = tl.minimum(lowest, x)
            highest = tl.maximum(highest, x)
    return total, squares, lowest, highest


@triton.jit
def _channel_moments_kernel(
    x_ptr, moments_ptr,
    P, C, pixels_per_slice, C_total, channel_offset, stride_moment, stride_xb, stride_xp, stride_xc,
    BOUND: tl.constexpr, EVEN: tl.constexpr, MANY: tl.constexpr, STEPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Moments of every channel over one slice of one image's pixels; lowest and highest only if BOUND.

    EVEN: nothing is outside. MANY: slices have more than STEPS * BLOCK_P pixels.
    """
    image = tl.program_id(2).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = channels < C
    first = tl.program_id(0) * pixels_per_slice
    last = tl.minimum(first + pixels_per_slice, P)
    places = tl.arange(0, BLOCK_P)
    ptrs = x_ptr + image * stride_xb + channels[None, :].to(tl.int64) * stride_xc + places[:, None].to(tl.int64) * stride_xp
    # Differences from the first value of each place in the tile: sums of x * x would cancel when the mean is large.
    shift = _load_pixels(ptrs, first, last, inside_c, stride_xp, BLOCK_P, EVEN)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    lowest = shift
    highest = shift
    total, squares, lowest, highest = _add_steps(
        ptrs, first, last, inside_c, stride_xp, shift, total, squares, lowest, highest, 1, BOUND, EVEN, STEPS, BLOCK_P
    )
    if MANY:
        for chunk in range(first + BLOCK_P * STEPS, last, BLOCK_P * STEPS):
            total, squares, lowest, highest = _add_steps(
                ptrs, chunk, last, inside_c, stride_xp, shift, total, squares, lowest, highest, 0, BOUND, EVEN, STEPS, BLOCK_P
            )

    # Every place has its own mean over the steps; then those of all places are put together.
    steps = tl.maximum((last - first - places + BLOCK_P - 1) // BLOCK_P, 0).to(tl.float32)[:, None]
    deviation = total / tl.maximum(steps, 1.0)
    squares -= total * deviation
    squares = tl.where(squares < 0.0, 0.0, squares)  # rounding; tl.maximum would hide a NaN
    place_mean = shift + deviation
    count = (last - first).to(tl.float32)
    mean = tl.sum(steps * place_mean, axis=0) / count
    away = place_mean - mean[None, :]
    out = moments_ptr + (image * tl.num_programs(0) + tl.program_id(0)) * C_total + channel_offset + channels
    tl.store(out, mean, mask=inside_c)
    tl.store(out + stride_moment, tl.sum(squares + steps * away * away, axis=0), mask=inside_c)
    if BOUND:
        if not EVEN:
            empty = (steps == 0.0) | tl.zeros((BLOCK_P, BLOCK_C), tl.int1)
            lowest = tl.where(empty, float("inf"), lowest)
            highest = tl.where(empty, -float("inf"), highest)
        tl.store(out + 2 * stride_moment, tl.min(lowest, axis=0), mask=inside_c)
        tl.store(out + 3 * stride_moment, tl.max(highest, axis=0), mask=inside_c)


@triton.jit(do_not_specialize=["slices", "channels_per_group"])
def _group_affine_kernel(
    moments_ptr, weight_ptr, bias_ptr, affine_ptr, absmax_ptr,
    P, C_total, slices, pixels_per_slice, channels_per_group, seam, stride_moment, stride_affine, eps,
    SILU: tl.constexpr, BOUND: tl.constexpr, LARGEST: tl.constexpr, BLOCK_SLICES: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """y = x * affine[0] + affine[1] for the channels of one group of one image; BOUND: and their activated_absmax per segment,
    or their activated_max if LARGEST. All slices are in the tile, so that memory is waited for once."""
    group = tl.program_id(0)
    image = tl.program_id(1)
    local = tl.arange(0, BLOCK_G)
    inside_c = local < channels_per_group
    channels = group * channels_per_group + local
    steps = tl.arange(0, BLOCK_SLICES)
    inside = (steps < slices)[:, None] & inside_c[None, :]
    moments = moments_ptr + (image * slices + steps)[:, None] * C_total + channels[None, :]
    means = tl.load(moments, mask=inside, other=0.0)
    squares = tl.load(moments + stride_moment, mask=inside, other=0.0)
    if BOUND:
        lowest = tl.load(moments + 2 * stride_moment, mask=inside, other=float("inf"))
        highest = tl.load(moments + 3 * stride_moment, mask=inside, other=-float("inf"))
    weight = tl.load(weight_ptr + channels, mask=inside_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=inside_c, other=0.0).to(tl.float32)

    count = tl.minimum(P - steps * pixels_per_slice, pixels_per_slice).to(tl.float32)[:, None]
    size = 1.0 * P * channels_per_group
    mean = tl.sum(tl.sum(tl.where(inside, count * means, 0.0), axis=1), axis=0) / size
    difference = means - mean
    squares = tl.where(inside, squares + count * difference * difference, 0.0)
    variance = tl.sum(tl.sum(squares, axis=1), axis=0) / size

    factor = weight / tl.sqrt_rn(variance + eps)
    offset = bias - mean * factor
    tl.store(affine_ptr + image * C_total + channels, factor, mask=inside_c)
    tl.store(affine_ptr + stride_affine + image * C_total + channels, offset, mask=inside_c)
    if BOUND:
        one_end = tl.min(lowest, axis=0) * factor + offset
        other_end = tl.max(highest, axis=0) * factor + offset
        low, high = tl.minimum(one_end, other_end), tl.maximum(one_end, other_end)
        if LARGEST:
            bound = tl.maximum(tl.maximum(silu(low), silu(high)), 0.0)
        else:
            bound = silu_absmax(low, high) if SILU else tl.maximum(tl.abs(low), tl.abs(high))
        bound = tl.where((factor == factor) & (offset == offset), bound, float("inf"))  # maxima drop NaN
        absmax = absmax_ptr + image * 2 * tl.num_programs(0) + group
        tl.store(absmax, tl.max(tl.where(inside_c & (channels < seam), bound, 0.0), axis=0))
        tl.store(absmax + tl.num_programs(0), tl.max(tl.where(inside_c & (channels >= seam), bound, 0.0), axis=0))


@dataclass(frozen=True)
class GroupStatistics:
    """affine: (2, B, C) fp32, factor and offset. absmax: (B, 2, GROUPS) fp32 after SiLU, per segment, or what else `bound` asked for."""

    affine: Tensor
    absmax: Tensor


def group_statistics(segments: Sequence[Tensor], weight: Tensor, bias: Tensor, eps: float, silu: bool, bound: Bound) -> GroupStatistics:
    """Statistics of the segments' concatenation, (B, C_i, H, W) each with one distance between neighbouring pixels."""
    B, seam, H, W = segments[0].shape
    P, C = H * W, sum(x.shape[1] for x in segments)
    least = BLOCK_P * STEPS
    pixels_per_slice = cdiv(P, least * MAX_SLICES) * least
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
            BOUND=bound is not Bound.NONE, EVEN=P % pixels_per_slice == 0 and channels % BLOCK_C == 0,
            MANY=pixels_per_slice > least, STEPS=STEPS, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
        channel_offset += channels
    launch(
        _group_affine_kernel, (GROUPS, B),
        moments, weight, bias, affine, absmax, P, C, slices, pixels_per_slice, C // GROUPS, seam, moments.stride(0), affine.stride(0), eps,
        SILU=silu, BOUND=bound is not Bound.NONE, LARGEST=bound is Bound.LARGEST,
        BLOCK_SLICES=FEW_SLICES if slices <= FEW_SLICES else MAX_SLICES,
        BLOCK_G=max(LEAST_BLOCK_G, triton.next_power_of_2(C // GROUPS)), num_warps=4,
    )  # fmt: skip
    return GroupStatistics(affine, absmax)
