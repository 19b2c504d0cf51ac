"""Triton kernels of group_norm_silu_quantize: after the statistics, one pass from x to codes. Formula: ../group_norm_silu_quantize.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import WIDE, QuantizedActivation, WideActivation
from ..group_norm_silu_quantize import GROUPS, OPERATION, DynamicScale, check_group_norm
from ..quantize_token import TINY
from ..repeat import empty, launch
from ..static_scale import StaticScale
from .activations import SILU_DIP_DEPTH, silu
from .clipping import add_clipped, count_beyond_and_nan
from .encoding import reciprocal, static_entry
from .group_norm_statistics import Bound, GroupStatistics, group_statistics
from .launch import cdiv, on_device
from .packed_codes import pack_codes, row_absmax, shifted_ratio
from .quantize_static import pixel_strides
from .quantize_wide import empty_planes, write_planes
from .rounding import dynamic_scale, range_scale
from .row_parts import load_row, load_vector, neighbours, row_warps, split_row, store_row
from .scale_entries import ScaleEntries, scale_entries

# With 2 warps there are 25 instructions per value, with 4 there are 33.
BLOCK_P = 32
BLOCK_C = 64
NUM_WARPS = 2
BOUNDS = {DynamicScale.IMAGE: Bound.ABSMAX, DynamicScale.SILU_IMAGE: Bound.LARGEST, DynamicScale.TOKEN: Bound.NONE}


@triton.jit
def _normalize_quantize_kernel(
    x_ptr, affine_ptr, absmax_ptr, codes_ptr, scale_ptr, zero_point_ptr,
    table_ptr, zero_table_ptr, bucket_ptr, clipped_ptr, clipped_rows,
    P, C, C_total, stride_affine, stride_cm, images_per_scale, stride_xb, stride_xp, stride_xc,
    SILU: tl.constexpr, STATIC: tl.constexpr, HAS_ZERO_POINT: tl.constexpr, TINY: tl.constexpr,
    ABSMAX: tl.constexpr, ABSMAX_STRIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Codes of one tile of pixels and channels; affine_ptr and codes_ptr start at the segment's first channel."""
    image = tl.program_id(2).to(tl.int64)
    pixels = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = channels < C
    inside = (pixels < P)[:, None] & inside_c[None, :]
    x_ptrs = x_ptr + image * stride_xb + pixels[:, None] * stride_xp + channels[None, :].to(tl.int64) * stride_xc
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    affine_ptrs = affine_ptr + image * C_total + channels
    factor = tl.load(affine_ptrs, mask=inside_c, other=0.0)[None, :]
    offset = tl.load(affine_ptrs + stride_affine, mask=inside_c, other=0.0)[None, :]
    y = x * factor + offset
    if SILU:
        y = silu(y)

    CODES: tl.constexpr = codes_ptr.dtype.element_ty
    entry = image // images_per_scale
    first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (image % images_per_scale == 0)
    if STATIC:
        scale, zero_point = static_entry(
            table_ptr, zero_table_ptr, bucket_ptr, scale_ptr, zero_point_ptr, entry, entry >= 0, first, HAS_ZERO_POINT
        )
    else:
        largest = tl.max(tl.load(absmax_ptr + image * ABSMAX_STRIDE + tl.arange(0, ABSMAX)), axis=0)
        if HAS_ZERO_POINT:
            scale, zero_point = range_scale(largest, -SILU_DIP_DEPTH)
            tl.store(zero_point_ptr + entry, zero_point, mask=first)
        else:
            scale = dynamic_scale(largest, TINY, CODES)
            zero_point = 0
        tl.store(scale_ptr + entry, scale, mask=first)
    ratio = y * reciprocal(scale)
    if clipped_ptr is not None:
        is_first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (image == 0)
        clipped, ratio = count_beyond_and_nan(ratio, inside, zero_point, HAS_ZERO_POINT)
        add_clipped(clipped_ptr, clipped, clipped_rows, is_first)
    elif HAS_ZERO_POINT:
        ratio = tl.where(ratio == ratio, ratio, 0.0)
    if tl.float8e4nv != CODES:
        ratio = shifted_ratio(ratio, zero_point, HAS_ZERO_POINT)
    codes = pack_codes(ratio, CODES)
    tl.store(codes_ptr + (image * P + pixels)[:, None] * stride_cm + channels[None, :], codes, mask=inside)


@triton.jit
def _normalize_quantize_token_kernel(
    x_ptr, affine_ptr, codes_ptr, scale_ptr,
    P, C, stride_affine, stride_xb, stride_xp,
    SILU: tl.constexpr, TINY: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, EVEN: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Codes and scale of one pixel, all channels in registers; channels contiguous."""
    CODES: tl.constexpr = codes_ptr.dtype.element_ty
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    inside = (pixel < P)[:, None]
    head, tail = load_row(x_ptr + image * stride_xb + pixel[:, None] * stride_xp, C, inside, HEAD, TAIL, EVEN, VECTOR)
    factor_head, factor_tail = load_vector(affine_ptr + image * C, C, HEAD, TAIL, EVEN, VECTOR)
    offset_head, offset_tail = load_vector(affine_ptr + stride_affine + image * C, C, HEAD, TAIL, EVEN, VECTOR)
    head = head * factor_head + offset_head
    tail = tail * factor_tail + offset_tail
    if SILU:
        head = silu(head)
        tail = silu(tail)
    scale = dynamic_scale(row_absmax(head, tail), TINY, CODES)
    row = image * P + pixel
    tl.store(scale_ptr + row, scale)
    inverse = reciprocal(scale)[:, None]
    head, tail = pack_codes(head * inverse, CODES), pack_codes(tail * inverse, CODES)
    store_row(codes_ptr + row[:, None] * C, C, inside, head, tail, HEAD, TAIL, EVEN, VECTOR)


def _apply(x: Tensor, statistics: GroupStatistics, first_channel: int, absmax: Tensor, codes: Tensor, entries: ScaleEntries,
           is_static: bool, silu: bool, clipped_rows: int) -> None:  # fmt: skip
    """Write the codes (B, H, W, C_i) of one segment, a slice of all channels' codes if those are joined."""
    B, C, H, W = x.shape
    affine = statistics.affine[:, :, first_channel:]
    launch(
        _normalize_quantize_kernel, (cdiv(H * W, BLOCK_P), cdiv(C, BLOCK_C), B),
        x, affine, absmax, codes, entries.scale, entries.zero_point_or_scale, *entries.tables,
        entries.clipped, clipped_rows,
        H * W, C, statistics.affine.shape[2], affine.stride(0), codes.stride(2), entries.rows_per_scale // (H * W),
        x.stride(0), pixel_strides(x)[1], x.stride(1),
        SILU=silu, STATIC=is_static, HAS_ZERO_POINT=entries.zero_point is not None, TINY=TINY,
        ABSMAX=absmax.shape[1], ABSMAX_STRIDE=absmax.stride(0), BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip


def _apply_per_token(x: Tensor, statistics: GroupStatistics, silu: bool, dtype: torch.dtype) -> QuantizedActivation:
    B, C, H, W = x.shape
    codes = empty((B, H, W, C), dtype, x.device)
    scale = empty((B * H * W,), torch.float32, x.device)
    head, tail = split_row(C)
    launch(
        _normalize_quantize_token_kernel, (H * W, B),
        x, statistics.affine, codes, scale, H * W, C, statistics.affine.stride(0), x.stride(0), pixel_strides(x)[1],
        SILU=silu, TINY=TINY, HEAD=head, TAIL=tail, EVEN=head + tail == C, VECTOR=neighbours(C), num_warps=row_warps(C),
    )  # fmt: skip
    return QuantizedActivation(codes, scale, None, 1)


def group_norm_silu_quantize(
    segments: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    silu: bool = True,
    static: Sequence[StaticScale] = (),
    dynamic: DynamicScale = DynamicScale.IMAGE,
    joined: bool = True,
    dtype: torch.dtype = torch.int8,
) -> list[QuantizedActivation] | list[WideActivation]:
    """See group_norm_silu_quantize_ref: scales to fp32 rounding, codes at most 1 apart and that on fewer than 1 in 1000."""
    check_group_norm(segments, weight, bias, silu, static, dynamic, joined, dtype)
    segments = [pixel_strides(x)[0] for x in segments]
    per_token = not static and dynamic is DynamicScale.TOKEN
    if per_token and segments[0].stride(1) != 1:
        segments = [segments[0].contiguous(memory_format=torch.channels_last)]
    with on_device(weight):
        bound = Bound.NONE if static else BOUNDS[dynamic]
        statistics = group_statistics(segments, weight.contiguous(), bias.contiguous(), eps, silu, bound)
        if per_token:
            return [_apply_per_token(segments[0], statistics, silu, dtype)]
        if dtype is WIDE:
            return [_apply_wide(segments, statistics, silu)]
        return _apply_segments(segments, statistics, silu, static, joined, bound is Bound.LARGEST, dtype)


def _apply_wide(segments: Sequence[Tensor], statistics: GroupStatistics, silu: bool) -> WideActivation:
    B, _, H, W = segments[0].shape
    into = empty_planes((B, H, W, sum(x.shape[1] for x in segments)), B, H * W, segments[0].device)
    first_channel = 0
    for x in segments:
        write_planes(x, statistics.affine, first_channel, statistics.absmax.view(B, 2 * GROUPS), into, silu)
        first_channel += x.shape[1]
    return into


def _apply_segments(
    segments: Sequence[Tensor],
    statistics: GroupStatistics,
    silu: bool,
    static: Sequence[StaticScale],
    joined: bool,
    zero_point: bool,
    dtype: torch.dtype,
) -> list[QuantizedActivation]:
    """zero_point: dynamic scales have one."""
    B, _, H, W = segments[0].shape
    device, rows = segments[0].device, B * H * W
    widths = [sum(x.shape[1] for x in segments)] if joined else [x.shape[1] for x in segments]
    outputs = []
    for i, width in enumerate(widths):
        codes = empty((B, H, W, width), dtype, device)
        outputs.append((codes, scale_entries(OPERATION, static[i] if static else None, rows, B, H * W, device, zero_point)))
    first_channel = 0
    for i, x in enumerate(segments):
        codes, entries = outputs[0 if joined else i]
        absmax = statistics.absmax.view(B, 2 * GROUPS) if joined else statistics.absmax[:, i]
        part = codes[..., first_channel:] if joined else codes
        counted = 0 if joined and i else rows  # a row of joined segments is counted with its first
        _apply(x, statistics, first_channel, absmax, part, entries, bool(static), silu, counted)
        first_channel += x.shape[1]
    return [QuantizedActivation(codes, entries.scale, entries.zero_point, entries.rows_per_scale) for codes, entries in outputs]
