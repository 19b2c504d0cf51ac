"""What quantizing a layer's input does to its output, simulated in floats on recorded rows: any activation mode, 8 bits or fewer.

Weights stay float here, so that activation modes are told apart by their own noise. Integer products give the same but for
fp32's rounding; fewer than 8 bits have no kernel and are simulations only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .calibration import Calibration, quantized_values
from .channel_group import HEADROOM, ChannelGrouping, grouped_statistics
from .layers import SILU_LOW
from .observer import LayerStatistics
from .scheme import ActivationMode, Scheme
from .sqnr import sqnr_db
from .timestep import ScaleCurve
from .weight import SMALLEST_SCALE

WIDE_MAX = 127 * 256  # the largest of token16's codes
# Relative energy below which noise is no noise: few rows may happen to be exact.
LEAST_NOISE = 1e-12


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
    grouped = grouped_statistics(statistics, grouping, HEADROOM if scheme.is_static else 1.0)
    return grouping.undo(_simulated(grouped, base, groups, is_conv, bits, importance))


def group_importance(grouping: ChannelGrouping, energy: Tensor) -> Tensor:
    """(K,): what a squared error counts at each stored position, in units of the shared base scale."""
    return energy[grouping.order.long()] * torch.exp2(2.0 * grouping.by_position())


def _simulated(
    statistics: LayerStatistics,
    scheme: Scheme,
    groups: tuple[int, ...] | ScaleCurve,
    is_conv: bool,
    bits: int,
    importance: Tensor | None,
) -> Tensor:
    rows, largest = statistics.rows.float(), 2 ** (bits - 1) - 1
    if scheme.activation is ActivationMode.FP16:
        return rows
    if scheme.activation in (ActivationMode.TOKEN, ActivationMode.TOKEN16):
        if is_conv and not scheme.symmetric:
            return above_low(rows, _image_extreme(statistics, statistics.range_max), bits)
        size = rows.abs().amax(1)
        if is_conv:
            size = _image_extreme(statistics, torch.maximum(statistics.range_min.abs(), statistics.range_max.abs()))
        if scheme.is_wide:
            largest, bits = WIDE_MAX, 16
        return quantized_values(rows, size.clamp_min(SMALLEST_SCALE)[:, None] / largest, 0, True, bits)
    tables = Calibration({"layer": statistics}).tables("layer", scheme, groups, bits, importance)
    scale = tables.scale[statistics.row_bucket][:, None]
    zero_point = 0 if tables.zero_point is None else tables.zero_point[statistics.row_bucket][:, None]
    return quantized_values(rows, scale, zero_point, scheme.symmetric, bits)


def above_low(x: Tensor, high: Tensor, bits: int, low: float = SILU_LOW) -> Tensor:
    """x as the codes of a dynamic scale for [low, high] hold it. high: (B,) of x (B, ...)."""
    levels = 2**bits - 1
    high = high.clamp_min(0).view(-1, *[1] * (x.ndim - 1))
    scale = (high - low) / levels
    zero_point = (-low / scale).round()
    return ((x / scale).round().add_(zero_point).clamp_(0, levels) - zero_point) * scale


def _image_extreme(statistics: LayerStatistics, extremes: Tensor) -> Tensor:
    """(R,): the largest of `extremes` (V, C) in each row's bucket."""
    return extremes.amax(1)[torch.searchsorted(statistics.buckets, statistics.row_bucket)]


def output_sqnr_db(rows: Tensor, noisy: Tensor, weight: Tensor, row_bucket: Tensor | None = None) -> float:
    """SQNR of the layer's output, in dB: energies summed over rows and output channels; of each bucket's rows, then the mean of dB.

    Inputs are far larger at some timesteps than at others: summed over all of them, noise that spoils the others would not count.

    A convolution's taps are summed as if their inputs were independent: recorded pixels have no neighbours. That leaves
    differences between modes as they are.
    Args: rows, noisy: (R, K). weight: (N, K) or (Cout, Cin, kh, kw), any float dtype. row_bucket: (R,); None: all rows as of one bucket.
    """
    matrix = weight.detach().float().transpose(0, 1).flatten(1)  # (K, N * taps)
    if row_bucket is None:
        return sqnr_db(rows.float() @ matrix, noisy @ matrix)
    energy, noise = ((part @ matrix).double().square().sum(1) for part in (rows.float(), noisy - rows.float()))
    ratios = bucket_sums(noise, row_bucket) / bucket_sums(energy, row_bucket).clamp_min(1e-30)
    return float(-10 * ratios.clamp_min(LEAST_NOISE).log10().mean())


def bucket_sums(values: Tensor, row_bucket: Tensor) -> Tensor:
    """(R,) -> (V,), summed over the rows of each bucket that has any, ascending."""
    _, slot = row_bucket.unique(return_inverse=True)
    return torch.zeros(int(slot.max()) + 1, dtype=values.dtype).index_add_(0, slot, values)
