"""Launcher of fp8_conv2d. Formula: ../fp8_conv2d.py; kernel: conv_kernel.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import QuantizedActivation
from ..fp8_conv2d import check_fp8_conv
from .int8_conv2d import Geometry, launch_conv


def fp8_conv2d(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    out_dtype: torch.dtype = torch.float16,
    *,
    second: QuantizedActivation | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """See fp8_conv2d_ref; sums are in the tensor cores' order and precision."""
    check_fp8_conv(activation, qweight, weight_scale, bias, stride, padding, second)
    geometry = Geometry.of(activation.codes, qweight.shape[1], stride, padding)
    finish = geometry.finish("fp8_conv2d", qweight.shape[0], addend, None, None)
    return launch_conv(activation, second, qweight, weight_scale, None, bias, out_dtype, geometry, finish)
