"""Launcher of int8_upsample_conv2d: all four phases in one launch. Formula: ../int8_upsample_conv2d.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import QuantizedActivation
from ..int8_upsample_conv2d import PhaseWeight, check_upsample
from .int8_conv2d import Geometry, launch_conv


def int8_upsample_conv2d(
    activation: QuantizedActivation,
    weight: PhaseWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    addend: Tensor | None = None,
) -> Tensor:
    """See int8_upsample_conv2d_ref; the integer sums are the same, the scaling may round differently."""
    check_upsample(activation, weight, bias)
    geometry = Geometry.upsampling(activation.codes)
    finish = geometry.finish("int8_upsample_conv2d", weight.scale.shape[1], addend, None, None)
    return launch_conv(activation, None, weight.codes, weight.scale, weight.border_sums, bias, out_dtype, geometry, finish)
