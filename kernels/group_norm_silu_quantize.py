"""GroupNorm and SiLU whose result is NHWC int8 codes, not floats. Formula, checks and reference; kernels in triton_ops."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import LayoutError
from .activation import WIDE, QuantizedActivation, WideActivation
from .layer_norm_quantize import MAX_ROW
from .quantize_image import check_images, encode_images, range_scale
from .quantize_static import quantize_static_ref
from .quantize_token import dynamic_scale, quantize_token_ref
from .quantize_wide import encode_wide_images
from .static_scale import StaticScale, check_static_codes

OPERATION = "group_norm_silu_quantize"
GROUPS = 32  # SDXL's, and the VAE's: GroupNorm(32, ...) everywhere
# The one minimum of SiLU: silu'(x) = 0 is x + 1 + exp(x) = 0 with x negative.
SILU_DIP = -1.2784645427610738
SILU_DIP_DEPTH = 0.2784645427610738


class DynamicScale(str, Enum):
    """What shares a scale that is computed from the values themselves."""

    IMAGE = "image"  # for a 3x3 convolution, whose sums run over pixels
    SILU_IMAGE = "silu_image"  # the same with a zero point: SiLU's dip is the fixed low end
    TOKEN = "token"  # one per pixel, for a matrix product over pixels


def check_group_norm(
    segments: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    silu: bool,
    static: Sequence[StaticScale],
    dynamic: DynamicScale,
    joined: bool,
    dtype: torch.dtype = torch.int8,
) -> None:
    """Raise LayoutError unless the segments are images of one size and everything fits their channels."""
    check_static_codes(OPERATION, static, dtype, writes_wide=True)
    if dtype is WIDE and (dynamic is DynamicScale.TOKEN or not joined):
        raise LayoutError(f"{OPERATION}: 16-bit codes per pixel or of separate segments. Use one scale per image and joined segments.")
    if dynamic is DynamicScale.SILU_IMAGE and dtype is not torch.int8:
        raise LayoutError(f"{OPERATION}: a zero point for {dtype} codes, which are symmetric. Use a symmetric scale per image.")
    if len(segments) not in (1, 2):
        raise LayoutError(f"{OPERATION}: {len(segments)} segments; 1, or 2 of a skip connection, are needed. Join the others first.")
    for x in segments:
        check_images(x, OPERATION)
    shapes = [tuple(x.shape) for x in segments]
    if any(shape[0] != shapes[0][0] or shape[2:] != shapes[0][2:] for shape in shapes):
        raise LayoutError(f"{OPERATION}: segments {shapes}; the same batch, height and width are needed. Pass tensors of one level.")
    channels = sum(shape[1] for shape in shapes)
    if channels % GROUPS:
        raise LayoutError(f"{OPERATION}: {channels} channels; a multiple of {GROUPS} is needed. Normalise and quantize separately.")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != (channels,):
            raise LayoutError(f"{OPERATION}: {name} of shape {tuple(vector.shape)}; ({channels},) is needed. Pass this norm's own.")
    if silu is False and dynamic is DynamicScale.SILU_IMAGE:
        raise LayoutError(f"{OPERATION}: SiLU's low end without SiLU; values fall below it. Use a symmetric scale per image.")
    outputs = 1 if joined else len(segments)
    if len(static) not in (0, outputs):
        raise LayoutError(f"{OPERATION}: {len(static)} static scales for {outputs} outputs; one each, or none, is needed.")
    if not static and dynamic is DynamicScale.TOKEN and (len(segments) > 1 or channels > MAX_ROW):
        raise LayoutError(
            f"{OPERATION}: a scale per pixel over {len(segments)} segments of {channels} channels in all; one segment of at most "
            f"{MAX_ROW} is supported. Join the segments first, or use a scale per image."
        )


def activated_absmax(lowest: Tensor, highest: Tensor, silu: bool) -> Tensor:
    """The largest |silu(y)|, or |y|, that any y in [lowest, highest] has, elementwise.

    SiLU falls to its dip and rises after it, so that over an interval |silu| is largest at an end, or in the dip if the
    interval contains it. Of values that are only known to lie in the interval, with both ends among them, this is their
    own maximum (a) without SiLU, (b) if the dip is not inside, (c) if silu(highest) >= 0.2785, the dip's depth, that is
    highest >= 0.465; else a bound. The largest over an image's channels is therefore exact as soon as one channel
    reaches 0.465, and never too small; normalised values reach it unless the norm's bias is strongly negative throughout.
    """
    if not silu:
        return torch.maximum(lowest.abs(), highest.abs())
    ends = torch.maximum(functional.silu(lowest).abs(), functional.silu(highest).abs())
    around_dip = (lowest < SILU_DIP) & (highest > SILU_DIP)
    return torch.where(around_dip, ends.clamp_min(SILU_DIP_DEPTH), ends)


def activated_max(lowest: Tensor, highest: Tensor) -> Tensor:
    """The largest silu(y), or 0, of y in [lowest, highest], both ends among them: SiLU falls, then rises, so it is at an end."""
    return torch.maximum(functional.silu(lowest), functional.silu(highest)).clamp_min(0)


def group_norm_silu_quantize_ref(
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
    """Normalise the channels of all segments in 32 groups, apply SiLU, quantize.

    y = (x - mean(group)) / sqrt(var(group) + eps) * weight[c] + bias[c], var with the group's size as divisor, all fp32;
    z = silu(y) or y; codes of z by quantize_static's formula if `static` is given, else by quantize_token's over pixels,
    or with scale[b] = max(absmax[b], 2^-100) / 127, absmax[b] the largest activated_absmax of image b's channels,
    or with quantize_image's range_scale of [-0.2785, the largest activated_max of image b's channels].
    y and z are never rounded to 16 bit.
    Args:
        segments: 1 or 2 tensors (B, C_i, H, W), any float dtype, NCHW, channels_last or strided; left unchanged. The
            norm runs over their concatenation along C, which is never made: groups may lie across the seam.
        weight, bias: (C,) any float dtype, C the sum of C_i, a multiple of 32. eps: > 0.
        static: one entry per output, its samples divide B. Empty: `dynamic` says what shares a scale.
        joined: one output over all channels; else one per segment, each with its own scale.
        dtype: of the codes, int8 or, symmetric and dynamic only, float8_e4m3fn with 448 for 127; activation.WIDE,
            joined and with DynamicScale.IMAGE only, for quantize_wide's two planes.
    Returns: per output, codes (B, H, W, channels) contiguous.
    Raises: LayoutError if the shapes do not fit.
    """
    check_group_norm(segments, weight, bias, silu, static, dynamic, joined, dtype)
    B, _, H, W = segments[0].shape
    x = torch.cat([segment.float() for segment in segments], 1)
    y = functional.group_norm(x, GROUPS, weight.float(), bias.float(), eps)
    z = functional.silu(y) if silu else y
    channels = [x.shape[1]] if joined else [segment.shape[1] for segment in segments]
    if static:
        for entry in static:
            entry.rows_per_scale(OPERATION, B * H * W, B)
        parts = zip(z.split(channels, 1), static, strict=True)
        return [quantize_static_ref(part, entry.scale, entry.zero_point, entry.bucket, entry.clipped) for part, entry in parts]
    if dynamic is DynamicScale.TOKEN:
        rows = quantize_token_ref(z.permute(0, 2, 3, 1).reshape(B * H * W, -1), dtype)
        return [QuantizedActivation(rows.codes.view(B, H, W, -1), rows.scale, None, 1)]
    lowest, highest = y.amin((2, 3)), y.amax((2, 3))  # (B, C)
    if dynamic is DynamicScale.SILU_IMAGE:
        parts = zip(z.split(channels, 1), activated_max(lowest, highest).split(channels, 1), strict=True)
        return [encode_images(part, *range_scale(high.amax(1), -SILU_DIP_DEPTH)) for part, high in parts]
    absmax = activated_absmax(lowest, highest, silu)
    if dtype is WIDE:
        return [encode_wide_images(z, absmax.amax(1))]
    parts = zip(z.split(channels, 1), absmax.split(channels, 1), strict=True)
    return [encode_images(part, dynamic_scale(largest.amax(1), dtype), None, dtype) for part, largest in parts]
