"""Quantization of two images' pixels as if they were joined along the channels: a skip connection before a 1x1 convolution.

Formula, checks and reference; kernels in triton_ops. The joined image, up to 63 MB at 1024x1024, is never made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import QuantizedActivation
from .quantize_static import quantize_static_ref
from .quantize_token import quantize_token_ref
from .static_scale import StaticScale, check_static_codes

OPERATION = "quantize_joined"


def check_joined(first: Tensor, second: Tensor, static: StaticScale | None, dtype: torch.dtype) -> None:
    """Raise LayoutError unless both are float images of one size, and the static samples divide the batch."""
    shapes = [tuple(first.shape), tuple(second.shape)]
    are_images = all(x.ndim == 4 and x.is_floating_point() for x in (first, second))
    if not are_images or shapes[0][0] != shapes[1][0] or shapes[0][2:] != shapes[1][2:]:
        raise LayoutError(f"{OPERATION}: images {shapes}; two float (B, C, H, W) of one batch and size are needed. Pass one level's.")
    check_static_codes(OPERATION, static, dtype)
    if static is not None:
        B, _, H, W = first.shape
        static.rows_per_scale(OPERATION, B * H * W, B)


def quantize_joined_ref(
    first: Tensor, second: Tensor, static: StaticScale | None = None, dtype: torch.dtype = torch.int8
) -> QuantizedActivation:
    """quantize_token_ref, or quantize_static_ref if `static` is given, of the joined images' pixels.

    Args:
        first, second: (B, C_i, H, W) any float dtype and strides; left unchanged.
        static: its samples divide B; None for one symmetric scale per pixel, over the channels of both.
        dtype: of the codes, int8, or float8_e4m3fn without `static`.
    Returns: codes (B * H * W, C_1 + C_2), channels of `first` first; scales as of the operation named above.
    Raises: LayoutError if the shapes do not fit.
    """
    check_joined(first, second, static, dtype)
    rows = torch.cat((first, second), 1).permute(0, 2, 3, 1).flatten(0, 2)
    if static is None:
        return quantize_token_ref(rows, dtype)
    return quantize_static_ref(rows, static.scale, static.zero_point, static.bucket, static.clipped)
