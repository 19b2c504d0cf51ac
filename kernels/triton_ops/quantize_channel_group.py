"""Triton kernels of quantize_channel_group: channels are gathered in stored order while they are quantized.

Formula: ../quantize_channel_group.py. A row's channels are read by one program, so that gathering stays within it or the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..channel_group import ChannelGroups
from ..quantize_channel_group import check_input
from ..quantize_static import gather_buckets
from ..quantize_token import TINY
from ..repeat import empty, launch
from ..static_scale import StaticScale
from .clipping import add_clipped, count, count_beyond
from .encoding import reciprocal
from .launch import cdiv, on_device
from .packed_codes import divided, pack_codes, shifted_ratio
from .quantize_image import BLOCK_SLICES, _image_scale_kernel
from .quantize_static import pixel_strides
from .rounding import dynamic_scale, magnitude, round_half_even

BLOCK_ELEMENTS = 2048
MAX_BLOCK_K = 2048
# Where channels are not neighbours in memory (NCHW), pixels are: 32 of them fill a cache line or two.
STRIDED_BLOCK = (32, 64)
BLOCK_P, BLOCK_C = 64, 64
# Rows of so many channels have a program each, and are brought into order in its shared memory. Two warps at least: within one,
# Triton would exchange values between all its registers.
LEAST_ROW, MAX_HELD = 256, 8192
LEAST_WARPS = 2


@triton.jit
def _grouped_slice_absmax_kernel(
    x_ptr, channel_factor_ptr, absmax_ptr,
    P, C, stride_xb, stride_xp, stride_xc,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """absmax[image, slice] of x * channel_factor over all channels of BLOCK_P pixels; in memory order, no gather."""
    image = tl.program_id(1).to(tl.int64)
    pixels = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + image * stride_xb + pixels[:, None] * stride_xp + channels[None, :].to(tl.int64) * stride_xc
    absmax = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for c in range(0, C, BLOCK_C):
        inside_c = channels < C - c
        x = tl.load(x_ptrs, mask=(pixels[:, None] < P) & inside_c[None, :], other=0.0)
        factor = tl.load(channel_factor_ptr + c + channels, mask=inside_c, other=0.0)
        absmax = tl.maximum(absmax, magnitude(x) * factor[None, :])
        x_ptrs += BLOCK_C * stride_xc
    tl.store(absmax_ptr + image * tl.num_programs(0) + tl.program_id(0), tl.max(tl.max(absmax, axis=1), axis=0))


@triton.jit
def _quantize_channel_group_row_kernel(
    x_ptr, codes_ptr, order_ptr, channel_factor_ptr, scale_ptr, zero_point_ptr, clipped_ptr,
    P, K, rows_per_scale, stride_xb, stride_xp,
    DYNAMIC: tl.constexpr, IS_STATIC: tl.constexpr, HAS_ZERO_POINT: tl.constexpr, TINY: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row of neighbouring channels, read once: quantized in memory order, and its codes then brought into stored order.

    DYNAMIC: makes and stores the row's scale; else it is the image's, or IS_STATIC: a stored one.
    """
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0)
    row = image * P + pixel
    ks = tl.arange(0, BLOCK_K)
    inside = ks < K
    x = tl.load(x_ptr + image * stride_xb + pixel * stride_xp + ks, mask=inside, other=0.0).to(tl.float32)
    x *= tl.load(channel_factor_ptr + ks, mask=inside, other=0.0)
    order = tl.load(order_ptr + ks, mask=inside, other=0)
    if DYNAMIC:
        scale = dynamic_scale(tl.max(magnitude(x), axis=0), TINY)
        tl.store(scale_ptr + row, scale)
    else:
        scale = tl.load(scale_ptr + row // rows_per_scale)
    if IS_STATIC:
        zero_point = tl.load(zero_point_ptr + row // rows_per_scale) if HAS_ZERO_POINT else 0
        ratio = x * reciprocal(scale)  # may be infinite, which the exact division does not bear
        if clipped_ptr is not None:
            clipped = count_beyond(ratio[None, :], inside[None, :], zero_point, HAS_ZERO_POINT)
            add_clipped(clipped_ptr, clipped, P * tl.num_programs(1), (pixel == 0) & (image == 0))
        if HAS_ZERO_POINT:
            ratio = tl.where(ratio == ratio, ratio, 0.0)
        ratio = shifted_ratio(ratio, zero_point, HAS_ZERO_POINT)
    else:
        ratio = divided(x, scale, reciprocal(scale))
    # As floats: the gather goes through shared memory, whose banks are 4 bytes wide.
    codes = pack_codes(tl.gather(ratio, order, axis=0), tl.int8)
    tl.store(codes_ptr + row * K + ks, codes, mask=inside)


@triton.jit
def _quantize_channel_group_kernel(
    x_ptr, codes_ptr, order_ptr, position_factor_ptr, channel_factor_ptr, scale_ptr, zero_point_ptr, clipped_ptr,
    P, K, rows_per_scale, stride_xb, stride_xp, stride_xc,
    DYNAMIC: tl.constexpr, HAS_ZERO_POINT: tl.constexpr, TINY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_P rows of one image. DYNAMIC: makes and stores each row's scale; else row m reads entry m // rows_per_scale."""
    image = tl.program_id(1).to(tl.int64)
    pixels = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    ks = tl.arange(0, BLOCK_K)
    inside_p = pixels < P
    row_ptrs = x_ptr + image * stride_xb + pixels[:, None] * stride_xp
    rows = image * P + pixels
    if DYNAMIC:
        absmax = tl.zeros((BLOCK_P,), tl.float32)
        for k in range(0, K, BLOCK_K):
            inside_k = ks < K - k
            x = tl.load(row_ptrs + (k + ks)[None, :].to(tl.int64) * stride_xc, mask=inside_p[:, None] & inside_k[None, :], other=0.0)
            factor = tl.load(channel_factor_ptr + k + ks, mask=inside_k, other=0.0)
            absmax = tl.maximum(absmax, tl.max(magnitude(x) * factor[None, :], axis=1))
        scale = dynamic_scale(absmax, TINY)
        tl.store(scale_ptr + rows, scale, mask=inside_p)
    else:
        scale = tl.load(scale_ptr + rows // rows_per_scale, mask=inside_p, other=1.0)
    LOWEST: tl.constexpr = -128 if HAS_ZERO_POINT else -127
    if clipped_ptr is not None:
        beyond = tl.zeros((BLOCK_P, BLOCK_K), tl.int32)
    for k in range(0, K, BLOCK_K):
        inside_k = ks < K - k
        inside = inside_p[:, None] & inside_k[None, :]
        channel = tl.load(order_ptr + k + ks, mask=inside_k, other=0)
        factor = tl.load(position_factor_ptr + k + ks, mask=inside_k, other=0.0)
        x = tl.load(row_ptrs + channel[None, :].to(tl.int64) * stride_xc, mask=inside, other=0.0).to(tl.float32) * factor[None, :]
        codes = round_half_even(tl.div_rn(x, tl.broadcast_to(scale[:, None], (BLOCK_P, BLOCK_K))))
        if HAS_ZERO_POINT:
            codes += tl.load(zero_point_ptr + rows // rows_per_scale, mask=inside_p, other=0)[:, None]
        if clipped_ptr is not None:
            beyond += (inside & ((codes < LOWEST) | (codes > 127))).to(tl.int32)
        codes = tl.minimum(tl.maximum(codes, LOWEST), 127)
        tl.store(codes_ptr + rows[:, None] * K + (k + ks)[None, :], codes.to(tl.int8), mask=inside)
    if clipped_ptr is not None:
        add_clipped(clipped_ptr, count(beyond), P * tl.num_programs(1), (tl.program_id(0) == 0) & (image == 0))


def quantize_channel_group(x: Tensor, groups: ChannelGroups, static: StaticScale | None = None) -> QuantizedActivation:
    """See quantize_channel_group_ref, whose codes and scales these are; static ones but where x / scale is a tie but for rounding."""
    check_input(x, groups)
    zero_point, rows_per_scale, dynamic = None, 1, static is None and x.ndim == 2
    if static is not None:
        scale, zero_point, rows_per_scale = gather_buckets(x, static.scale, static.zero_point, static.bucket)
    elif dynamic:
        scale = empty((x.shape[0],), torch.float32, x.device)
    else:
        x, _ = pixel_strides(x)
        scale, rows_per_scale = _image_scale(x, groups), x.shape[2] * x.shape[3]
    codes = _store(x, groups, scale, zero_point, rows_per_scale, dynamic, static)
    return QuantizedActivation(codes, scale, zero_point, rows_per_scale)


def _image_scale(x: Tensor, groups: ChannelGroups) -> Tensor:
    """(B,) fp32 scale of each image; x has passed pixel_strides."""
    B, C, H, W = x.shape
    _, stride_p = pixel_strides(x)
    slices = cdiv(H * W, BLOCK_P)
    absmax = empty((B, slices), torch.float32, x.device)
    scale = empty((B,), torch.float32, x.device)
    with on_device(x):
        launch(
            _grouped_slice_absmax_kernel, (slices, B),
            x, groups.channel_factor, absmax, H * W, C, x.stride(0), stride_p, x.stride(1), BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=8,
        )  # fmt: skip
        launch(
            _image_scale_kernel, (B,),
            absmax, scale, None, slices, LOW=None, TINY=TINY, IS_FP8=False, BLOCK_SLICES=BLOCK_SLICES, num_warps=1,
        )  # fmt: skip
    return scale


def _store(
    x: Tensor,
    groups: ChannelGroups,
    scale: Tensor,
    zero_point: Tensor | None,
    rows_per_scale: int,
    dynamic: bool,
    static: StaticScale | None,
) -> Tensor:
    """The codes; fills `scale` if dynamic, and what `static` counts."""
    if x.ndim == 4:
        B, C, H, W = x.shape
        x, stride_p = pixel_strides(x)
        P, stride_b, stride_c, shape = H * W, x.stride(0), x.stride(1), (B, H, W, C)
    else:
        (P, C), B, shape = x.shape, 1, tuple(x.shape)
        stride_b, stride_p, stride_c = 0, x.stride(0), x.stride(1)
    pointers = (scale, scale if zero_point is None else zero_point, None if static is None else static.clipped)
    flags = {"DYNAMIC": dynamic, "HAS_ZERO_POINT": zero_point is not None, "TINY": TINY}
    codes = empty(shape, torch.int8, x.device)
    block_k = triton.next_power_of_2(C)
    with on_device(x):
        if stride_c == 1 and LEAST_ROW <= C <= MAX_HELD:
            launch(
                _quantize_channel_group_row_kernel, (P, B),
                x, codes, groups.order, groups.channel_factor, *pointers, P, C, rows_per_scale, stride_b, stride_p,
                **flags, IS_STATIC=static is not None, BLOCK_K=block_k, num_warps=max(LEAST_WARPS, min(8, block_k // 512)),
            )  # fmt: skip
            return codes
        if stride_c == 1:
            block_k = min(block_k, MAX_BLOCK_K)
            block_p = max(1, min(BLOCK_ELEMENTS // block_k, triton.next_power_of_2(P)))
        else:
            block_p, block_k = STRIDED_BLOCK
        launch(
            _quantize_channel_group_kernel, (cdiv(P, block_p), B),
            x, codes, groups.order, groups.position_factor, groups.channel_factor, *pointers,
            P, C, rows_per_scale, stride_b, stride_p, stride_c, **flags, BLOCK_P=block_p, BLOCK_K=block_k, num_warps=4,
        )  # fmt: skip
    return codes
