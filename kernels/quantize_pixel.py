"""Dynamic quantization with one scale per pixel, symmetric or above a fixed low end, NHWC codes. Reference; kernel in triton_ops."""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import QuantizedActivation
from .quantize_image import INT8_MIN, check_images, check_low, range_scale
from .quantize_token import INT8_MAX, dynamic_scale


def quantize_pixel_ref(x: Tensor, low: float | None = None) -> QuantizedActivation:
    """Quantize every pixel of x with its own scale, over its channels; formulas as of quantize_image_ref.

    Args:
        x: (B, C, H, W) any float dtype, NCHW, channels_last or strided; left unchanged.
        low: < 0, the lowest value that x can have; lower ones are clipped. None for symmetric scales.
    Returns: codes (B, H, W, C) contiguous, scale (B * H * W,), zero point of as many if there is a low, rows_per_scale 1.
    Raises: LayoutError if x is not a float (B, C, H, W), or low is not below 0.
    """
    check_images(x, "quantize_pixel")
    check_low(low, "quantize_pixel")
    B, C, H, W = x.shape
    rows = x.permute(0, 2, 3, 1).float().reshape(B * H * W, C)
    absmax = rows.abs().amax(1)
    if low is None:
        scale, zero_point, lowest = dynamic_scale(absmax), None, -INT8_MAX
    else:
        scale, zero_point = range_scale(torch.where(torch.isfinite(absmax), rows.amax(1).clamp_min(0), torch.inf), low)
        lowest = INT8_MIN
    codes = (rows / scale[:, None]).nan_to_num_(nan=0.0).round_()
    if zero_point is not None:
        codes += zero_point[:, None]
    return QuantizedActivation(codes.clamp_(lowest, INT8_MAX).to(torch.int8).view(B, H, W, C), scale, zero_point, 1)
