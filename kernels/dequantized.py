"""The fallback without integer compute: codes are dequantized and multiplied in the output's float dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import QuantizedActivation
from .int8_conv2d import check_conv
from .int8_gemm import check_gemm


def dequantized_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """int8_gemm_ref's result up to the rounding of `out_dtype`; same arguments, same errors."""
    check_gemm(activation, qweight, weight_scale, weight_sum, bias)
    weight = (qweight.float() * weight_scale[:, None]).to(out_dtype)
    return torch.nn.functional.linear(activation.dequantize(out_dtype), weight, None if bias is None else bias.to(out_dtype))


def dequantized_conv2d(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    border_sums: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """int8_conv2d_ref's result up to the rounding of `out_dtype`; same arguments, same errors."""
    check_conv(activation, qweight, weight_scale, border_sums, bias, stride, padding)
    weight = (qweight.float() * weight_scale.view(-1, 1, 1, 1)).to(out_dtype).permute(0, 3, 1, 2)
    x = activation.dequantize(out_dtype).permute(0, 3, 1, 2)
    y = torch.nn.functional.conv2d(x, weight, None if bias is None else bias.to(out_dtype), stride, padding)
    return y.contiguous(memory_format=torch.channels_last)
