"""The fallback of channel groups without integer compute: codes become floats before they are multiplied."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear

from .activation import QuantizedActivation
from .channel_group import ChannelGroups
from .channel_group_conv2d import check_grouped_conv
from .channel_group_gemm import check_grouped_gemm


def dequantized_channel_group_gemm(
    activation: QuantizedActivation,
    groups: ChannelGroups,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """channel_group_gemm_ref's result up to the rounding of `out_dtype`; same arguments, same errors."""
    check_grouped_gemm(activation, groups, qweight, weight_scale, weight_sum, bias)
    weight = (qweight.float() * weight_scale[:, None]).to(out_dtype)
    return linear(_floats(activation, groups, out_dtype), weight, None if bias is None else bias.to(out_dtype))


def dequantized_channel_group_conv2d(
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
    """channel_group_conv2d_ref's result up to the rounding of `out_dtype`; same arguments, same errors."""
    check_grouped_conv(activation, groups, qweight, weight_scale, border_sums, bias, stride, padding)
    x = _floats(activation, groups, out_dtype).permute(0, 3, 1, 2)
    weight = (qweight.float() * weight_scale.view(-1, 1, 1, 1)).to(out_dtype).permute(0, 3, 1, 2)
    y = conv2d(x, weight, None if bias is None else bias.to(out_dtype), stride, padding)
    return y.contiguous(memory_format=torch.channels_last)


def _floats(activation: QuantizedActivation, groups: ChannelGroups, dtype: torch.dtype) -> Tensor:
    """The activation's values, channels in stored order."""
    return (activation.dequantize() / groups.position_factor).to(dtype)
