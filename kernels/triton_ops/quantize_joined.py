"""Triton kernels of quantize_joined: one launch reads both images and writes one row of codes per pixel. Formula: ../quantize_joined.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..quantize_joined import OPERATION, check_joined
from ..quantize_token import TINY
from ..repeat import empty, launch
from ..static_scale import StaticScale
from .clipping import add_clipped, count_beyond_and_nan
from .encoding import reciprocal, static_entry
from .launch import cdiv, on_device
from .packed_codes import divided, larger, pack_codes, row_absmax, shifted_ratio
from .quantize_static import pixel_strides
from .rounding import dynamic_scale
from .row_parts import load_parts, row_warps, split_row, store_row
from .scale_entries import scale_entries

BLOCK_P = 64
BLOCK_C = 64


@triton.jit
def _joined_static_kernel(
    first_ptr, second_ptr, codes_ptr, scale_ptr, zero_point_ptr, table_ptr, zero_table_ptr, bucket_ptr, clipped_ptr,
    P, seam, C, images_per_scale, stride_first_b, stride_first_p, stride_second_b, stride_second_p,
    HAS_ZERO_POINT: tl.constexpr, EVEN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of pixels and channels, of either image. EVEN: nothing is outside. Channels are contiguous."""
    image = tl.program_id(2).to(tl.int64)
    pixels = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    blocks = tl.cdiv(seam, BLOCK_C)  # of the first image's channels
    in_second = tl.program_id(1) >= blocks
    local = (tl.program_id(1) - tl.where(in_second, blocks, 0)) * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = local + tl.where(in_second, seam, 0)
    if in_second:
        x_ptrs = second_ptr + image * stride_second_b + (pixels[:, None] * stride_second_p + local[None, :])
        inside = (pixels < P)[:, None] & (channels < C)[None, :]
    else:
        x_ptrs = first_ptr + image * stride_first_b + (pixels[:, None] * stride_first_p + local[None, :])
        inside = (pixels < P)[:, None] & (channels < seam)[None, :]
    x = tl.load(x_ptrs) if EVEN else tl.load(x_ptrs, mask=inside, other=0.0)
    entry = image // images_per_scale
    first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (image % images_per_scale == 0)
    scale, zero_point = static_entry(
        table_ptr, zero_table_ptr, bucket_ptr, scale_ptr, zero_point_ptr, entry, entry >= 0, first, HAS_ZERO_POINT
    )
    ratio = x.to(tl.float32) * reciprocal(scale)
    if clipped_ptr is not None:
        is_first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (image == 0)
        clipped, ratio = count_beyond_and_nan(ratio, inside, zero_point, HAS_ZERO_POINT)
        add_clipped(clipped_ptr, clipped, P * tl.num_programs(2), is_first)
    elif HAS_ZERO_POINT:
        ratio = tl.where(ratio == ratio, ratio, 0.0)
    codes = pack_codes(shifted_ratio(ratio, zero_point, HAS_ZERO_POINT), codes_ptr.dtype.element_ty)
    code_ptrs = codes_ptr + image * P * C + (pixels[:, None] * C + channels[None, :])
    if EVEN:
        tl.store(code_ptrs, codes)
    else:
        tl.store(code_ptrs, codes, mask=inside)


@triton.jit
def _joined_token_kernel(
    first_ptr, second_ptr, codes_ptr, scale_ptr,
    P, seam, C, stride_first_b, stride_first_p, stride_second_b, stride_second_p,
    TINY: tl.constexpr, FIRST_HEAD: tl.constexpr, FIRST_TAIL: tl.constexpr, SECOND_HEAD: tl.constexpr, SECOND_TAIL: tl.constexpr,
    EVEN: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One pixel: both images' channels in registers. Channels are contiguous."""
    CODES: tl.constexpr = codes_ptr.dtype.element_ty
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    inside = (pixel < P)[:, None]
    first_row = first_ptr + image * stride_first_b + pixel[:, None] * stride_first_p
    second_row = second_ptr + image * stride_second_b + pixel[:, None] * stride_second_p
    a, b = load_parts(first_row, seam, inside, FIRST_HEAD, FIRST_TAIL, EVEN, VECTOR)
    c, d = load_parts(second_row, C - seam, inside, SECOND_HEAD, SECOND_TAIL, EVEN, VECTOR)
    row = image * P + pixel
    scale = dynamic_scale(larger(row_absmax(a, b), row_absmax(c, d)), TINY, CODES)
    tl.store(scale_ptr + row, scale)
    scale, inverse = scale[:, None], reciprocal(scale)[:, None]
    a = pack_codes(divided(a.to(tl.float32), scale, inverse), CODES)
    b = pack_codes(divided(b.to(tl.float32), scale, inverse), CODES)
    c = pack_codes(divided(c.to(tl.float32), scale, inverse), CODES)
    d = pack_codes(divided(d.to(tl.float32), scale, inverse), CODES)
    code_row = codes_ptr + row[:, None] * C
    store_row(code_row, seam, inside, a, b, FIRST_HEAD, FIRST_TAIL, EVEN, VECTOR)
    store_row(code_row + seam, C - seam, inside, c, d, SECOND_HEAD, SECOND_TAIL, EVEN, VECTOR)


def quantize_joined(
    first: Tensor, second: Tensor, static: StaticScale | None = None, dtype: torch.dtype = torch.int8
) -> QuantizedActivation:
    """See quantize_joined_ref; codes and scales as exact as quantize_token's and quantize_static's."""
    check_joined(first, second, static, dtype)
    first, second = (pixel_strides(x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)) for x in (first, second))
    (first, first_p), (second, second_p) = first, second
    B, seam, H, W = first.shape
    P, C = H * W, seam + second.shape[1]
    entries = scale_entries(OPERATION, static, B * P, B, 1, first.device)
    codes = empty((B * P, C), dtype, first.device)
    strides = (first.stride(0), first_p, second.stride(0), second_p)
    with on_device(first):
        if static is None:
            _launch_token(first, second, codes, entries.scale, strides)
        else:
            launch(
                _joined_static_kernel, (cdiv(P, BLOCK_P), cdiv(seam, BLOCK_C) + cdiv(C - seam, BLOCK_C), B),
                first, second, codes, entries.scale, entries.zero_point_or_scale, *entries.tables, entries.clipped,
                P, seam, C, entries.rows_per_scale // P, *strides,
                HAS_ZERO_POINT=entries.zero_point is not None, EVEN=not (P % BLOCK_P or seam % BLOCK_C or C % BLOCK_C),
                BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=4,
            )  # fmt: skip
    return QuantizedActivation(codes, entries.scale, entries.zero_point, entries.rows_per_scale)


def vector_of(*widths: int) -> int:
    """VECTOR of row_parts.py for images of these widths in one program."""
    threads = 32 * row_warps(sum(widths))
    return max(1, min(8, *(split_row(width)[1] // threads for width in widths)))


def _launch_token(first: Tensor, second: Tensor, codes: Tensor, scale: Tensor, strides: tuple[int, int, int, int]) -> None:
    B, seam, H, W = first.shape
    widths = (seam, second.shape[1])
    parts = [split_row(width) for width in widths]
    launch(
        _joined_token_kernel, (H * W, B),
        first, second, codes, scale, H * W, seam, sum(widths), *strides,
        TINY=TINY, FIRST_HEAD=parts[0][0], FIRST_TAIL=parts[0][1], SECOND_HEAD=parts[1][0], SECOND_TAIL=parts[1][1],
        EVEN=all(sum(part) == width for part, width in zip(parts, widths, strict=True)), VECTOR=vector_of(*widths),
        num_warps=row_warps(sum(widths)),
    )  # fmt: skip
