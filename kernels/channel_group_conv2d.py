"""int8 convolution over groups of input channels, NHWC. Formula, checks and reference; kernel in triton_ops."""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import QuantizedActivation
from .channel_group import ChannelGroups, shifted_codes
from .channel_group_gemm import grouped_matmul
from .finish import as_images
from .int8_conv2d import PIXELS_PER_BLOCK, border_class, check_conv, inside_taps, output_side, unfold


def grouped_border_sums(qweight: Tensor, groups: ChannelGroups) -> Tensor:
    """int8_conv2d.border_sums with every code times its group's 2^exponent.

    Args: qweight: (Cout, 3, 3, Cin) int8, channels in stored order.
    Returns: (16, Cout) int32.
    """
    taps = shifted_codes(qweight, groups).sum(-1, dtype=torch.int32)  # (Cout, 3, 3)
    inside = inside_taps(taps.shape[1], qweight.device)
    by_row = (taps[None] * inside[:, None, :, None]).sum(2, dtype=torch.int32)
    by_class = (by_row[:, None] * inside[None, :, None, :]).sum(3, dtype=torch.int32)
    return by_class.view(len(inside) ** 2, -1)


def check_grouped_conv(
    activation: QuantizedActivation,
    groups: ChannelGroups,
    qweight: Tensor,
    weight_scale: Tensor,
    border_sums: Tensor | None,
    bias: Tensor | None,
    stride: int,
    padding: int,
) -> None:
    """Raise LayoutError unless the operands of channel_group_conv2d fit together."""
    check_conv(activation, qweight, weight_scale, border_sums, bias, stride, padding)
    groups.check("channel_group_conv2d", activation.codes.shape[3])


def channel_group_conv2d_ref(
    activation: QuantizedActivation,
    groups: ChannelGroups,
    qweight: Tensor,
    weight_scale: Tensor,
    border_sums: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Conv2d on codes in groups of input channels: all taps of a channel are in the same group.

    y[b, n, p] = scale[b] * weight_scale[n] * (acc[b, p, n] - zero_point[b] * border_sums[class(p), n]) + bias[n]
    with acc = sum over taps and channels inside the image of code * weight code * 2^exponent[channel], exact int32.
    DGQ groups the columns of the unfolded input, so that the taps of one channel may be in different groups, and pixels too:
    neither has an integer product that reads each input pixel once.
    Args:
        activation: codes (B, H, W, Cin) from quantize_channel_group, one scale per image or per whole number of images.
        qweight: (Cout, 3, 3, Cin) int8, channels in stored order. weight_scale: (Cout,) fp32.
        border_sums: (16, Cout) int32 from grouped_border_sums(). May be None if the activation is symmetric.
        bias: (Cout,) any float dtype, or None. stride: 1 or 2. padding: 0 or 1.
    Returns: (B, Cout, Ho, Wo) out_dtype with channels_last strides.
    Raises: LayoutError if the shapes do not fit.
    Source: DGQ (arXiv 2501.04304), section 4.1, tied over taps.
    """
    check_grouped_conv(activation, groups, qweight, weight_scale, border_sums, bias, stride, padding)
    B, H, W, _ = activation.codes.shape
    Cout, kernel = qweight.shape[:2]
    Ho, Wo = output_side(H, kernel, stride, padding), output_side(W, kernel, stride, padding)
    scale = activation.per_row(activation.scale)[:: H * W]  # (B,)
    zero_point = None if activation.zero_point is None else activation.per_row(activation.zero_point)[:: H * W]
    halo = None if zero_point is None else border_sums[border_class(H, W, kernel, stride, padding, qweight.device).view(-1)]
    flat_weight, borders = qweight.reshape(Cout, -1), groups.borders
    y = torch.empty(B, Ho * Wo, Cout, dtype=out_dtype, device=qweight.device)
    step = max(1, PIXELS_PER_BLOCK // (Ho * Wo))  # images
    for b in range(0, B, step):
        images = slice(b, b + step)
        columns = unfold(activation.codes[images], kernel, stride, padding)
        acc = grouped_matmul(columns, flat_weight, borders, kernel * kernel).view(-1, Ho * Wo, Cout)
        if zero_point is not None:
            acc -= zero_point[images, None, None] * halo
        product = acc * (scale[images, None, None] * weight_scale)
        y[images] = product if bias is None else product + bias.float()
    return as_images(y.view(-1, Cout), B, Ho, Wo)
