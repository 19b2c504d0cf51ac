"""Dynamic quantization with one scale per image, symmetric or above a low end, NHWC codes. Formula and reference; kernel in triton_ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import QuantizedActivation
from .quantize_token import INT8_MAX, dynamic_scale, symmetric_codes

INT8_MIN = -128
INT8_STEPS = 255


def check_images(x: Tensor, operation: str) -> None:
    """Raise LayoutError unless x is a (B, C, H, W) float tensor."""
    if x.ndim != 4 or not x.is_floating_point():
        raise LayoutError(f"{operation}: x is {x.dtype} {tuple(x.shape)}; a float (B, C, H, W) is needed. Pass the convolution's input.")


def check_low(low: float | None, dtype: torch.dtype) -> None:
    """Raise LayoutError unless low is None or a number below 0, and None for codes of floating point."""
    if low is not None and dtype is not torch.int8:
        raise LayoutError(f"quantize_image: low {low} for {dtype} codes, which have no zero point. Pass None, or ask for int8.")
    if low is not None and not -math.inf < low < 0:
        raise LayoutError(f"quantize_image: low {low}; a finite number below 0 is needed, or None for a symmetric scale.")


def range_scale(high: Tensor, low: float) -> tuple[Tensor, Tensor]:
    """fp32 high >= 0 -> fp32 scale and int32 zero point of [low, high]: (high - low) / 255 and round(-low / scale) - 128.

    NaN and 0 where high is NaN or infinite. low < 0 keeps the scale from being 0.
    """
    scale = (high - low) / torch.full_like(high, INT8_STEPS)
    zero_point = (torch.full_like(high, -low) / scale).round() + INT8_MIN
    finite = torch.isfinite(high)
    return torch.where(finite, scale, torch.nan), torch.where(finite, zero_point, 0.0).to(torch.int32)


def encode_images(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype = torch.int8) -> QuantizedActivation:
    """(B, C, H, W) fp32 with scale and zero point (B,) -> NHWC codes; codes 0 where the scale is NaN."""
    _, _, H, W = x.shape
    ratio = x.permute(0, 2, 3, 1) / scale.view(-1, 1, 1, 1)
    if zero_point is None:
        codes = symmetric_codes(ratio, dtype)
    else:
        codes = (ratio.nan_to_num_(nan=0.0).round_() + zero_point.view(-1, 1, 1, 1)).clamp_(INT8_MIN, INT8_MAX).to(torch.int8)
    return QuantizedActivation(codes.contiguous(), scale, zero_point, H * W)


def quantize_image_ref(x: Tensor, low: float | None = None, dtype: torch.dtype = torch.int8) -> QuantizedActivation:
    """Quantize every image of x with its own scale.

    Symmetric: scale[b] = max(absmax(x[b]), 2^-100) / 127; q = clamp(round(x / scale[b]), -127, 127), ties to even.
    With low: scale[b], zero_point[b] = range_scale(max(x[b], 0), low); q = clamp(round(x / scale[b]) + zero_point[b], -128, 127).
    fp8, symmetric only: 448 for 127, and rounded to the nearest e4m3 number.
    SiLU's outputs never fall below -0.28: of a symmetric scale, almost half the codes would never be used.
    An image with a NaN or an infinity gets scale NaN and codes 0: what is computed from it is NaN.
    One output of a 3x3 convolution meets nine pixels in one integer sum: a scale for less than an image needs every tile's border pixels
    twice. Simulated on the demo model, tiles of 8x8 and 4x4 pixels (1.6 and 2.3 times the codes) take 2.5 and 4.0 dB off the noise of these
    inputs, but 0.9 and 1.3 dB off the UNet's, because of what its other layers make. quantize_wide takes off all.
    Args:
        x: (B, C, H, W) any float dtype, NCHW, channels_last or strided; left unchanged.
        low: < 0, the lowest value that x can have, whatever the image; lower ones are clipped. None for a symmetric scale.
        dtype: of the codes, int8 or float8_e4m3fn.
    Returns: codes (B, H, W, C) contiguous, scale (B,), zero point (B,) if there is a low, rows_per_scale H * W.
    Raises: LayoutError if x is not a float (B, C, H, W), or low is not below 0, or given for fp8 codes.
    """
    check_images(x, "quantize_image")
    check_low(low, dtype)
    x = x.float()
    absmax = x.abs().amax((1, 2, 3))
    if low is None:
        return encode_images(x, dynamic_scale(absmax, dtype), None, dtype)
    high = torch.where(torch.isfinite(absmax), x.amax((1, 2, 3)).clamp_min(0), torch.inf)
    return encode_images(x, *range_scale(high, low))
