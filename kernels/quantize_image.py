"""Dynamic quantization with one symmetric scale per image, NHWC codes. Formula and reference; kernel in triton_ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import QuantizedActivation
from .quantize_token import INT8_MAX, dynamic_scale


def check_images(x: Tensor, operation: str) -> None:
    """Raise LayoutError unless x is a (B, C, H, W) float tensor."""
    if x.ndim != 4 or not x.is_floating_point():
        raise LayoutError(f"{operation}: x is {x.dtype} {tuple(x.shape)}; a float (B, C, H, W) is needed. Pass the convolution's input.")


def quantize_image_ref(x: Tensor) -> QuantizedActivation:
    """Quantize every image of x with its own symmetric scale.

    scale[b] = max(absmax(x[b]), 2^-100) / 127; q = clamp(round(x / scale[b]), -127, 127), ties to even.
    An image with a NaN or an infinity gets scale NaN and codes 0: what is computed from it is NaN.
    Per image is the finest dynamic scale of a 3x3 convolution: one output meets nine pixels in one integer sum.
    Args:
        x: (B, C, H, W) any float dtype, NCHW, channels_last or strided; left unchanged.
    Returns: codes (B, H, W, C) contiguous, scale (B,), no zero point, rows_per_scale H * W.
    Raises: LayoutError if x is not a float (B, C, H, W).
    """
    check_images(x, "quantize_image")
    _, _, H, W = x.shape
    x = x.permute(0, 2, 3, 1).float()
    scale = dynamic_scale(x.abs().amax((1, 2, 3)))
    ratio = (x / scale.view(-1, 1, 1, 1)).nan_to_num_(nan=0.0)
    codes = ratio.round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8).contiguous()
    return QuantizedActivation(codes, scale, None, H * W)
