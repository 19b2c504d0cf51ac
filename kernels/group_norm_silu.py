"""GroupNorm and SiLU of an image in one pass over NHWC: what comes before the UNet's last convolution, which stays 16 bit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .group_norm_silu_quantize import GROUPS, DynamicScale, check_group_norm


def check_group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise LayoutError unless x (B, C, H, W) fits weight and bias (C,), C a multiple of 32."""
    check_group_norm([x], weight, bias, True, (), DynamicScale.IMAGE, joined=True)


def group_norm_silu_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """silu((x - mean(group)) / sqrt(var(group) + eps) * weight[c] + bias[c]) in fp32, rounded once; var with the group's size as divisor.

    Args: x: (B, C, H, W) any float dtype and strides, left unchanged. weight, bias: (C,) any float dtype. eps: > 0.
    Returns: (B, C, H, W) channels_last, x's dtype.
    Raises: LayoutError if the shapes do not fit or C is no multiple of 32.
    """
    check_group_norm_silu(x, weight, bias)
    y = functional.silu(functional.group_norm(x.float(), GROUPS, weight.float(), bias.float(), eps))
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)
