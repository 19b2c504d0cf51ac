"""What quantizing a layer's input does to its output, simulated in floats on recorded rows: any activation mode, 8 bits or fewer.

Weights stay float here, so that activation modes are told apart by their own noise. Integer products give the same but for
fp32's rounding; fewer than 8 bits have no kernel and are simulations only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .calibration import Calibration, quantized_values
from .channel_group import ChannelGrouping, grouped_statistics
from .observer import LayerStatistics
from .scheme import ActivationMode, Scheme
from .sqnr import sqnr_db
from .timestep import ScaleCurve
from .weight import SMALLEST_SCALE


def simulated_rows(
    statistics: LayerStatistics,
    scheme: Scheme,
    groups: tuple[int, ...] | ScaleCurve,
    *,
    is_conv: bool = False,
    bits: int = 8,
    grouping: ChannelGrouping | None = None,
    energy: Tensor | None = None,
) -> Tensor:
    """The recorded rows as the codes of this scheme hold them, (R, K) fp32.

    A 3x3 convolution's dynamic scale is per image, and which image a recorded pixel came from is not known: its bucket's
    absmax stands in for the image's, which is an upper bound of the noise.
    Args:
        groups: timestep group of each of the 64 buckets, or a curve. is_conv: dynamic scales are per image.
        grouping: of a channel_group scheme. energy: (K,), what a squared error of each channel counts in choosing static ranges.
    """
    if not scheme.is_grouped:
        return _simulated(statistics, scheme, groups, is_conv, bits, None)
    base = Scheme(activation=scheme.group_base, symmetric=scheme.symmetric)
    importance = None if energy is None else group_importance(grouping, energy)
    return grouping.undo(_simulated(grouped_statistics(statistics, grouping), base, groups, is_conv, bits, importance))


def group_importance(grouping: ChannelGrouping, energy: Tensor) -> Tensor:
    """(K,): what a squared error counts at each stored position, in units of the shared base scale."""
    return energy[grouping.order.long()] * torch.exp2(2.0 * grouping.by_position())


def _simulated(
    statistics: LayerStatistics, scheme: Scheme, groups: tuple[int, ...] | ScaleCurve, is_conv: bool, bits: int, importance: Tensor | None
) -> Tensor:
    rows, largest = statistics.rows.float(), 2 ** (bits - 1) - 1
    if scheme.activation is ActivationMode.FP16:
        return rows
    if scheme.activation is ActivationMode.TOKEN:
        scale = (_image_absmax(statistics) if is_conv else rows.abs().amax(1)).clamp_min(SMALLEST_SCALE)[:, None] / largest
        return quantized_values(rows, scale, 0, True, bits)
    tables = Calibration({"layer": statistics}).tables("layer", scheme, groups, bits, importance)
    scale = tables.scale[statistics.row_bucket][:, None]
    zero_point = 0 if tables.zero_point is None else tables.zero_point[statistics.row_bucket][:, None]
    return quantized_values(rows, scale, zero_point, scheme.symmetric, bits)


def _image_absmax(statistics: LayerStatistics) -> Tensor:
    """(R,): the largest |x| seen in each row's bucket."""
    peak = torch.maximum(statistics.range_min.abs(), statistics.range_max.abs()).amax(1)
    return peak[torch.searchsorted(statistics.buckets, statistics.row_bucket)]


def output_sqnr_db(rows: Tensor, noisy: Tensor, weight: Tensor) -> float:
    """SQNR of the layer's output, in dB: energies summed over rows and output channels.

    A convolution's taps are summed as if their inputs were independent: recorded pixels have no neighbours. That leaves
    differences between modes as they are.
    Args: rows, noisy: (R, K). weight: (N, K) or (Cout, Cin, kh, kw), any float dtype.
    """
    matrix = weight.detach().float().transpose(0, 1).flatten(1)  # (K, N * taps)
    return sqnr_db(rows.float() @ matrix, noisy @ matrix)
