"""What a layer's input becomes in the quantized prefix of progressive calibration: rounded with the ranges seen so far. Runs no model.

Source: PCR (arXiv 2311.06322), progressive calibration: a step's statistics are gathered on what the quantized steps before it
made. Here a step is run twice, observed and then rounded, instead of anew from noise for each step: the same inputs for
O(T) calls instead of O(T^2). Weights stay float: at 8 bits, their noise is a tenth of the activations' (demo model, static scales).
"""

from __future__ import annotations

from torch import Tensor

from .calibration import quantized_values, static_range
from .layers import has_symmetric_input, needs_row_scales
from .observer import LayerObserver
from .weight import INT8_MAX, SMALLEST_SCALE


def rounded_input(layer: str, x: Tensor, observer: LayerObserver, bucket: int) -> Tensor:
    """x as the 8-bit codes of this layer's static scale for the bucket hold it, in x's shape and dtype; left unchanged itself.

    Args:
        x: (B, C, H, W) of a convolution or (..., K). Layers that keep a scale per row (layers.needs_row_scales) get those.
        observer: of this layer; a bucket that it never saw leaves x as it is.
    """
    if needs_row_scales(layer):
        scale = x.float().abs().amax(-1, keepdim=True).clamp_min(SMALLEST_SCALE) / INT8_MAX
        return quantized_values(x.float(), scale, 0, True).to(x.dtype)
    seen = observer.range_of(bucket)
    if seen is None:
        return x
    symmetric = has_symmetric_input(layer)
    scale, zero_point = static_range(*seen, symmetric)
    return quantized_values(x.float(), scale, zero_point, symmetric).to(x.dtype)
