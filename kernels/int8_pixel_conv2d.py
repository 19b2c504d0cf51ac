"""int8 convolution of images with a scale and zero point per pixel, NHWC. Formula, checks and reference; kernel in triton_ops.

One integer sum runs over the channels of one tap, whose pixel has one scale; the nine sums are scaled and added in fp32. The products
are as many as int8_conv2d's and as integer; what it costs is eight more conversions of the accumulator per output.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import LayoutError
from .activation import QuantizedActivation
from .finish import as_images
from .int8_conv2d import BORDER_CLASSES, check_geometry, output_side
from .int8_gemm import check_segments, check_weight_codes

OPERATION = "int8_pixel_conv2d"


def check_pixel_conv(
    activation: QuantizedActivation, qweight: Tensor, weight_scale: Tensor, border_sums: Tensor | None, bias: Tensor | None, stride: int
) -> None:
    """Raise LayoutError unless the operands of int8_pixel_conv2d fit together."""
    if qweight.ndim != 4 or tuple(qweight.shape[1:3]) != (3, 3):
        raise LayoutError(f"{OPERATION}: qweight of shape {tuple(qweight.shape)}; (Cout, 3, 3, Cin) is needed. A 1x1 one is a GEMM.")
    if activation.codes.ndim != 4 or activation.rows_per_scale != 1:
        raise LayoutError(
            f"{OPERATION}: codes {tuple(activation.codes.shape)}, a scale per {activation.rows_per_scale} pixels; "
            "NHWC (B, H, W, C) and one per pixel are needed. Use quantize_pixel, or int8_conv2d."
        )
    check_segments(OPERATION, activation, None, torch.int8)
    check_weight_codes(OPERATION, qweight, weight_scale, 9 * activation.codes.shape[3], bias)
    H, W = activation.codes.shape[1:3]
    whole = QuantizedActivation(activation.codes, activation.scale[:1], None, activation.rows)
    check_geometry(OPERATION, [whole], 3, stride, 1)
    shape = (BORDER_CLASSES, qweight.shape[0])
    if activation.zero_point is not None and (border_sums is None or border_sums.shape != shape):
        raise LayoutError(f"{OPERATION}: zero points without border_sums {shape} for {H}x{W} pixels; pass border_sums(qweight).")


def int8_pixel_conv2d_ref(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    border_sums: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int = 1,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """3x3 convolution with padding 1 on int8 codes that have a scale per pixel.

    y[b, n, p] = weight_scale[n] * sum_tap scale[q] * (sum_c codes[q, c] * qweight[n, tap, c] - zero_point[q] * sum_c qweight[n, tap, c])
    + bias[n], q the pixel that the tap meets at p; taps outside of the image add nothing.
    Args:
        activation: codes (B, H, W, C), scale (B * H * W,), zero point of as many or None, rows_per_scale 1.
        qweight: (Cout, 3, 3, C) int8. weight_scale: (Cout,) fp32. bias: (Cout,) any float dtype, or None. stride: 1 or 2.
        border_sums: (16, Cout) int32 from int8_conv2d.border_sums; the kernel takes each tap's sum from it. None without zero points.
    Returns: (B, Cout, Ho, Wo) out_dtype with channels_last strides.
    Raises: LayoutError if the shapes do not fit.
    """
    check_pixel_conv(activation, qweight, weight_scale, border_sums, bias, stride)
    B, H, W, _ = activation.codes.shape
    Ho, Wo = output_side(H, 3, stride, 1), output_side(W, 3, stride, 1)
    x = activation.dequantize().permute(0, 3, 1, 2)  # exact to one rounding; the padding is a true 0
    y = functional.conv2d(x, qweight.permute(0, 3, 1, 2).float(), None, stride, 1).permute(0, 2, 3, 1).reshape(B * Ho * Wo, -1)
    y = y * weight_scale
    return as_images((y if bias is None else y + bias.float()).to(out_dtype), B, Ho, Wo)
