"""Dynamic quantization to symmetric 16-bit codes in two int8 planes, per row or per image. Formula and reference; kernels in triton_ops.

For layers whose input does not bear 8 bits: two integer products take the place of one, and the weight stays int8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import PLANE_RATIO, WideActivation
from .quantize_token import INT8_MAX, TINY

LARGEST_WIDE_CODE = PLANE_RATIO * INT8_MAX


def check_wide(x: Tensor) -> None:
    """Raise LayoutError unless x is a float (M, K) or (B, C, H, W)."""
    if x.ndim not in (2, 4) or not x.is_floating_point():
        raise LayoutError(f"quantize_wide: x is {x.dtype} {tuple(x.shape)}; a float (M, K) or (B, C, H, W) is needed. Flatten rows first.")


def wide_scale(absmax: Tensor) -> Tensor:
    """fp32 absmax -> fp32 scale of the low plane: max(absmax, TINY) / 32512; NaN where absmax is NaN or infinite."""
    # A tensor, not a number: by a number CUDA multiplies with the reciprocal, which rounds otherwise.
    scale = absmax.clamp_min(TINY) / torch.full_like(absmax, LARGEST_WIDE_CODE)
    return torch.where(torch.isfinite(absmax), scale, torch.nan)


def wide_codes(ratio: Tensor) -> Tensor:
    """fp32 x / scale -> int32 codes: the nearest within [-32512, 32512], ties to even; NaN becomes 0."""
    return ratio.nan_to_num(nan=0.0).round_().clamp_(-LARGEST_WIDE_CODE, LARGEST_WIDE_CODE).int()


def encode_wide_images(x: Tensor, absmax: Tensor) -> WideActivation:
    """(B, C, H, W) fp32 with absmax (B,) -> NHWC codes in two planes; codes 0 where absmax is not finite."""
    _, _, H, W = x.shape
    scale = wide_scale(absmax)
    codes = wide_codes(x.permute(0, 2, 3, 1) / scale.view(-1, 1, 1, 1))
    return WideActivation.split(codes.contiguous(), scale, H * W)


def quantize_wide_ref(x: Tensor) -> WideActivation:
    """Quantize every row, or every image, of x with its own symmetric scale to 16 bits.

    scale = max(absmax, 2^-100) / 32512; q = clamp(round(x / scale), -32512, 32512), ties to even; high = floor((q + 128) / 256),
    low = q - 256 * high, which are int8. The error of x is at most absmax / 65024: for fp16's own rounding, 2^-11 of each value, to
    be smaller, a value has to be below a 32nd of the largest.
    A row or image with a NaN or an infinity gets scale NaN and codes 0: what is computed from it is NaN.
    Args: x: (M, K), or (B, C, H, W) NCHW, channels_last or strided; any float dtype; left unchanged.
    Returns: planes (M, K) with a scale per row, or (B, H, W, C) contiguous with one per image.
    Raises: LayoutError if x is neither.
    """
    check_wide(x)
    x = x.float()
    if x.ndim == 4:
        return encode_wide_images(x, x.abs().amax((1, 2, 3)))
    scale = wide_scale(x.abs().amax(1))
    return WideActivation.split(wide_codes(x / scale[:, None]), scale, 1)
