"""Triton kernel of quantize_static, also the second half of quantize_image. Formula: ../quantize_static.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..quantize_static import rows_per_bucket
from ..repeat import empty, launch
from .clipping import add_clipped, count, count_beyond_and_nan
from .encoding import reciprocal, static_entry
from .launch import cdiv, on_device
from .packed_codes import divided, pack_codes, shifted_ratio
from .rounding import nearest_code

BLOCK_P = 32
BLOCK_C = 128
# Of tensors that lie in the codes' order: the largest that divides what shares a scale.
FLAT_BLOCKS = (2048, 1024)
MAX_FLAT = 2**31  # positions are counted in 32 bits
MAX_SCALES = 65535  # of a grid's second axis


@triton.jit
def _quantize_flat_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_point_ptr, table_ptr, zero_table_ptr, bucket_ptr, clipped_ptr,
    values_per_scale, rows,
    LOOK_UP: tl.constexpr, HAS_ZERO_POINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As _quantize_static_kernel for BLOCK neighbouring values, all of one scale, where codes lie in x's order."""
    CODES: tl.constexpr = codes_ptr.dtype.element_ty
    entry = tl.program_id(1)
    places = entry * values_per_scale + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + places).to(tl.float32)
    if LOOK_UP:
        first = tl.program_id(0) == 0
        scale, zero_point = static_entry(
            table_ptr, zero_table_ptr, bucket_ptr, scale_ptr, zero_point_ptr, entry, entry >= 0, first, HAS_ZERO_POINT
        )
        ratio = x * reciprocal(scale)  # may be infinite, which the exact division does not bear
    else:
        scale = tl.load(scale_ptr + entry)
        zero_point = tl.load(zero_point_ptr + entry) if HAS_ZERO_POINT else 0
        ratio = divided(x, scale, reciprocal(scale))
    if clipped_ptr is not None:
        clipped, ratio = count_beyond_and_nan(ratio, places >= 0, zero_point, HAS_ZERO_POINT)
        add_clipped(clipped_ptr, clipped, rows, (tl.program_id(0) == 0) & (entry == 0))
    elif HAS_ZERO_POINT:
        ratio = tl.where(ratio == ratio, ratio, 0.0)
    if tl.float8e4nv != CODES:
        ratio = shifted_ratio(ratio, zero_point, HAS_ZERO_POINT)
    tl.store(codes_ptr + places, pack_codes(ratio, CODES))


@triton.jit
def _quantize_static_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_point_ptr, table_ptr, zero_table_ptr, bucket_ptr, clipped_ptr,
    P, C, rows_per_scale, stride_xb, stride_xp, stride_xc,
    LOOK_UP: tl.constexpr, HAS_ZERO_POINT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """LOOK_UP: scales and zero points come from the tables, and are stored for the codes' reader; else they are read."""
    image = tl.program_id(2).to(tl.int64)
    pixels = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_p = pixels < P
    inside = inside_p[:, None] & (channels[None, :] < C)
    x_ptrs = x_ptr + image * stride_xb + pixels[:, None] * stride_xp + channels[None, :].to(tl.int64) * stride_xc
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)

    rows = image * P + pixels
    entry = rows // rows_per_scale
    if LOOK_UP:
        first = inside_p & (rows % rows_per_scale + tl.program_id(1) == 0)  # of the entry's first row, and by one program
        scale, zero_point = static_entry(
            table_ptr, zero_table_ptr, bucket_ptr, scale_ptr, zero_point_ptr, entry, inside_p, first, HAS_ZERO_POINT
        )
    else:
        scale = tl.load(scale_ptr + entry, mask=inside_p, other=1.0)
        zero_point = tl.zeros((BLOCK_P,), tl.int32)
        if HAS_ZERO_POINT:
            zero_point = tl.load(zero_point_ptr + entry, mask=inside_p, other=0)
    CODES: tl.constexpr = codes_ptr.dtype.element_ty
    codes = nearest_code(tl.div_rn(x, tl.broadcast_to(scale[:, None], (BLOCK_P, BLOCK_C))), CODES)
    LOWEST: tl.constexpr = -128 if HAS_ZERO_POINT else -127
    if HAS_ZERO_POINT:
        codes += zero_point[:, None]
    if clipped_ptr is not None:
        beyond = inside & ((codes < LOWEST) | (codes > 127))
        is_first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (image == 0)
        add_clipped(clipped_ptr, count(beyond), P * tl.num_programs(2), is_first)
    if tl.float8e4nv != CODES:  # these are within their range already
        codes = tl.minimum(tl.maximum(codes, LOWEST), 127).to(tl.int8)
    tl.store(codes_ptr + rows[:, None] * C + channels[None, :], codes, mask=inside)


def pixel_strides(x: Tensor) -> tuple[Tensor, int]:
    """(B, C, H, W) -> x or a channels_last copy of it, and the distance of neighbouring pixels in row order.

    NCHW and channels_last have one such distance; a crop has not and is copied.
    """
    _, _, H, W = x.shape
    if H > 1 and W > 1 and x.stride(2) != W * x.stride(3):
        x = x.contiguous(memory_format=torch.channels_last)
    return x, x.stride(3) if W > 1 else x.stride(2)


def quantize_pixels(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, rows_per_scale: int, dtype: torch.dtype = torch.int8
) -> QuantizedActivation:
    """Quantize x (M, K) or (B, C, H, W) with scale (S,) and zero point (S,) or None, one entry per rows_per_scale rows."""
    return _quantize(x, scale, zero_point, rows_per_scale, dtype=dtype)


def quantize_static(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, bucket: Tensor, clipped: Tensor | None = None
) -> QuantizedActivation:
    """See quantize_static_ref: its codes and counts but where x / scale is a tie but for fp32's rounding, one value in 10^5."""
    rows_per_scale = rows_per_bucket(x, scale, zero_point, bucket)
    tables = (scale.contiguous(), None if zero_point is None else zero_point.contiguous(), bucket.contiguous())
    entries = empty(bucket.shape, torch.float32, x.device)
    zero_entries = None if zero_point is None else empty(bucket.shape, torch.int32, x.device)
    return _quantize(x, entries, zero_entries, rows_per_scale, tables, clipped)


def _quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    rows_per_scale: int,
    tables: tuple[Tensor, Tensor | None, Tensor] | None = None,
    clipped: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
) -> QuantizedActivation:
    """One launch. tables: scale and zero point by bucket, and the buckets; they fill scale and zero_point."""
    if x.ndim == 4:
        B, C, H, W = x.shape
        x, stride_p = pixel_strides(x)
        P, stride_b, stride_c, shape = H * W, x.stride(0), x.stride(1), (B, H, W, C)
    else:
        (P, C), B, shape = x.shape, 1, tuple(x.shape)
        stride_b, stride_p, stride_c = 0, x.stride(0), x.stride(1)
    codes, looks_up = empty(shape, dtype, x.device), tables is not None
    # Placeholders, where the kernel does not read: an absent pointer would be another kernel to compile.
    table, zero_table, bucket = (scale, None, scale) if tables is None else tables
    tables = (table, table if zero_table is None else zero_table, bucket)
    pointers = (x, codes, scale, scale if zero_point is None else zero_point, *tables, clipped)
    flags = {"LOOK_UP": looks_up, "HAS_ZERO_POINT": zero_point is not None}
    in_order = stride_c == 1 and stride_p == C and (B == 1 or stride_b == P * C) and x.numel() < MAX_FLAT
    values_per_scale = rows_per_scale * C
    few_scales = 0 < x.numel() <= MAX_SCALES * values_per_scale
    block = next((size for size in FLAT_BLOCKS if in_order and few_scales and values_per_scale % size == 0), None)
    with on_device(x):
        if block is not None:
            grid = (values_per_scale // block, x.numel() // values_per_scale)
            launch(_quantize_flat_kernel, grid, *pointers, values_per_scale, B * P, **flags, BLOCK=block, num_warps=4)
        else:
            launch(
                _quantize_static_kernel, (cdiv(P, BLOCK_P), cdiv(C, BLOCK_C), B),
                *pointers, P, C, rows_per_scale, stride_b, stride_p, stride_c, **flags, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=4,
            )  # fmt: skip
    return QuantizedActivation(codes, scale, zero_point, rows_per_scale)
