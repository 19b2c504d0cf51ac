"""Bias correction: what rounding a layer's weight adds to the mean of its output goes into its bias. Costs nothing at run time.

b* = b + (W - Ŵ) E[x] (Nagel et al., arXiv 1906.04721, section 4.2), with E[x] from calibration rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..file_format import QuantizedLayer
from ..int4 import int8_codes
from ..observer import LayerStatistics
from ..weight import dequantize_weight


def with_corrected_bias(layer: QuantizedLayer, weight: Tensor, statistics: LayerStatistics | None) -> QuantizedLayer:
    """The layer with what rounding has changed in its bias; itself if it has no bias or no input was recorded.

    Args: weight: what was rounded, (N, K) or (Cout, Cin, kh, kw). statistics: of the layer's input, from the unquantized model.
    """
    if layer.bias is None or statistics is None or not len(statistics.rows):
        return layer
    codes = layer.qweight if layer.group_scale is None else int8_codes(layer.qweight, layer.group_scale)
    rounded = dequantize_weight(codes, layer.weight_scale, torch.float32, layer.channel_order)
    if layer.branch_up is not None:
        rounded = rounded + layer.branch_up.float() @ layer.branch_down.float()
    shift = bias_shift(weight, rounded, statistics.rows)
    return replace(layer, bias=(layer.bias.float() + shift).to(layer.bias.dtype))


def bias_shift(weight: Tensor, rounded: Tensor, rows: Tensor) -> Tensor:
    """What to add to the bias, (N,) fp32.

    Args:
        weight, rounded: (N, K) or (Cout, Cin, kh, kw), the float weight and what its codes stand for.
        rows: (R, K) or (R, Cin), inputs of the layer, R > 0. For a conv each tap sees the same mean; padding at the border, where
            taps see zeros, is left out.
    """
    error = weight.float() - rounded.float()
    error = error.sum((2, 3)) if error.ndim == 4 else error
    return error @ rows.float().mean(0).to(error.device)
