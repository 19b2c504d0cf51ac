"""Triton kernels of quantize_wide, and the one with which group_norm_silu_quantize writes two planes. Formula: ../quantize_wide.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation, WideActivation
from ..quantize_token import TINY
from ..quantize_wide import check_wide
from ..repeat import empty, launch
from .activations import silu
from .encoding import reciprocal
from .launch import cdiv, on_device
from .packed_codes import divided
from .quantize_image import image_absmax
from .quantize_static import pixel_strides
from .rounding import magnitude
from .wide_codes import planes, wide_scale

BLOCK_K = 1024
BLOCK_P = 32
BLOCK_C = 64
BLOCK_ABSMAX = 64
NUM_WARPS = 2


@triton.jit
def _wide_rows_kernel(x_ptr, high_ptr, low_ptr, high_scale_ptr, low_scale_ptr, K, stride_xm, TINY: tl.constexpr, BLOCK_K: tl.constexpr):
    """One row, read twice: the second time it comes from the cache."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    largest = tl.zeros((BLOCK_K,), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row * stride_xm + k + columns, mask=columns < K - k, other=0.0)
        largest = tl.maximum(largest, magnitude(x))
    scale = wide_scale(tl.max(largest, axis=0), TINY)
    tl.store(low_scale_ptr + row, scale)
    tl.store(high_scale_ptr + row, scale * 256.0)
    inverse = reciprocal(scale)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row * stride_xm + k + columns, mask=columns < K - k, other=0.0).to(tl.float32)
        high, low = planes(divided(x, scale, inverse))
        tl.store(high_ptr + row * K + k + columns, high, mask=columns < K - k)
        tl.store(low_ptr + row * K + k + columns, low, mask=columns < K - k)


@triton.jit(do_not_specialize=["entries"])
def _wide_pixels_kernel(
    x_ptr, affine_ptr, absmax_ptr, high_ptr, low_ptr, high_scale_ptr, low_scale_ptr,
    entries, P, C, C_total, stride_affine, stride_cm, stride_xb, stride_xp, stride_xc,
    SILU: tl.constexpr, TINY: tl.constexpr, BLOCK_ABSMAX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Both planes of one tile of pixels and channels. affine_ptr: x * affine[0] + affine[1] first, and SiLU of that if SILU; or None.

    absmax_ptr: `entries` maxima of each image. affine_ptr, high_ptr and low_ptr start at the segment's first channel.
    """
    image = tl.program_id(2).to(tl.int64)
    pixels = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = channels < C
    inside = (pixels < P)[:, None] & inside_c[None, :]
    x_ptrs = x_ptr + image * stride_xb + pixels[:, None] * stride_xp + channels[None, :].to(tl.int64) * stride_xc
    y = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    if affine_ptr is not None:
        affine_ptrs = affine_ptr + image * C_total + channels
        factor = tl.load(affine_ptrs, mask=inside_c, other=0.0)[None, :]
        offset = tl.load(affine_ptrs + stride_affine, mask=inside_c, other=0.0)[None, :]
        y = y * factor + offset
    if SILU:
        y = silu(y)
    places = tl.arange(0, BLOCK_ABSMAX)
    largest = tl.zeros((BLOCK_ABSMAX,), tl.float32)
    for start in range(0, entries, BLOCK_ABSMAX):
        found = tl.load(absmax_ptr + image * entries + start + places, mask=places < entries - start, other=0.0)
        largest = tl.maximum(largest, found)
    scale = wide_scale(tl.max(largest, axis=0), TINY)
    first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    tl.store(low_scale_ptr + image, scale, mask=first)
    tl.store(high_scale_ptr + image, scale * 256.0, mask=first)
    # From a norm y is fp32 that was never rounded: its ties are not worth an exact division.
    inverse = reciprocal(scale)
    high, low = planes(divided(y, scale, inverse) if affine_ptr is None else y * inverse)
    offsets = (image * P + pixels)[:, None] * stride_cm + channels[None, :]
    tl.store(high_ptr + offsets, high, mask=inside)
    tl.store(low_ptr + offsets, low, mask=inside)


def empty_planes(shape: tuple[int, ...], scales: int, rows_per_scale: int, device: torch.device) -> WideActivation:
    """Memory for the planes, each an allocation of its own: kernels load 16 bytes at a time."""
    parts = [(empty(shape, torch.int8, device), empty((scales,), torch.float32, device)) for _ in range(2)]
    return WideActivation(*(QuantizedActivation(codes, scale, None, rows_per_scale) for codes, scale in parts))


def write_planes(x: Tensor, affine: Tensor | None, first_channel: int, absmax: Tensor, into: WideActivation, silu: bool) -> None:
    """The planes of x (B, C, H, W), from `first_channel` of `into` on.

    Args: affine: (2, B, channels of all segments), what x is multiplied with and what is added, or None. absmax: (B, entries) fp32 of
        all segments, contiguous. silu: applied after affine.
    """
    B, C, H, W = x.shape
    x, stride_p = pixel_strides(x)
    high, low = (plane.codes[..., first_channel:] for plane in (into.high, into.low))
    part = None if affine is None else affine[:, :, first_channel:]
    launch(
        _wide_pixels_kernel, (cdiv(H * W, BLOCK_P), cdiv(C, BLOCK_C), B),
        x, part, absmax, high, low, into.high.scale, into.low.scale,
        absmax.shape[1], H * W, C, 0 if affine is None else affine.shape[2], 0 if affine is None else affine.stride(0), high.stride(2),
        x.stride(0), stride_p, x.stride(1),
        SILU=silu, TINY=TINY, BLOCK_ABSMAX=BLOCK_ABSMAX, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip


def quantize_wide(x: Tensor) -> WideActivation:
    """See quantize_wide_ref, whose planes and scales these are, bit for bit."""
    check_wide(x)
    with on_device(x):
        if x.ndim == 4:
            B, C, H, W = x.shape
            x = pixel_strides(x)[0]
            into = empty_planes((B, H, W, C), B, H * W, x.device)
            write_planes(x, None, 0, image_absmax(x), into, silu=False)
            return into
        x = x if x.stride(1) == 1 else x.contiguous()
        M, K = x.shape
        into = empty_planes((M, K), M, 1, x.device)
        launch(
            _wide_rows_kernel, (M,),
            x, into.high.codes, into.low.codes, into.high.scale, into.low.scale, K, x.stride(0), TINY=TINY, BLOCK_K=BLOCK_K, num_warps=4,
        )  # fmt: skip
        return into
