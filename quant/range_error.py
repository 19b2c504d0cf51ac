"""The quantization error that recorded statistics predict for a range, per timestep bucket. Chooses nothing itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .calibration import CLIP_CANDIDATES, quantized_values, static_range
from .observer import LayerStatistics

# Enough for the error of a scale to be known within 0.3 dB, and few enough for the thousands of ranges that are tried.
VALUES_PER_BUCKET = 512


@dataclass(frozen=True)
class BucketValues:
    """What one layer's input looked like in the V visited buckets.

    buckets: (V,) int64, ascending. low, high: (V,) fp32, the extremes seen. values: (V, 512) fp32, recorded values.
    energy: (V,) fp32 > 0, their mean square.
    """

    buckets: Tensor
    low: Tensor
    high: Tensor
    values: Tensor
    energy: Tensor

    def relative_error(self, low: float, high: float, symmetric: bool, bits: int = 8) -> Tensor:
        """(V,): mean squared error of every bucket's values with one scale for [low, high], relative to their energy."""
        scale, zero_point = static_range(low, high, symmetric, bits)
        return (quantized_values(self.values, scale, zero_point, symmetric, bits) - self.values).square().mean(1) / self.energy


def bucket_values(statistics: LayerStatistics, count: int = VALUES_PER_BUCKET) -> BucketValues:
    """Values of the recorded rows by bucket. A bucket without a row gets values spread evenly over its range."""
    low, high = statistics.range_min.amin(1), statistics.range_max.amax(1)  # (V,)
    values = torch.empty(len(low), count)
    for visit, bucket in enumerate(statistics.buckets.tolist()):
        recorded = statistics.rows[statistics.row_bucket == bucket].float().flatten()
        if recorded.numel():
            # Evenly spaced in memory, so that every channel of the few rows has its turn.
            values[visit] = recorded[torch.linspace(0, recorded.numel() - 1, count).round().long()]
        else:
            values[visit] = torch.linspace(float(low[visit]), float(high[visit]), count)
    energy = values.square().mean(1).clamp_min(1e-12)
    return BucketValues(statistics.buckets, low, high, values, energy)


def segment_errors(values: BucketValues, symmetric: bool, bits: int = 8) -> Tensor:
    """(V, V) float64: entry [i, j] is the summed relative error of the visited buckets i..j if they share one range; inf for j < i.

    The range holds all of them, or is clipped as calibration.tables would.
    """
    V = len(values.buckets)
    known: dict[tuple[float, float], Tensor] = {}

    def errors_up_to(low: float, high: float) -> Tensor:
        """(len(CLIP_CANDIDATES), V + 1): cumulative over buckets, so that a segment's sum is one difference."""
        key = (0.0, max(-low, high)) if symmetric else (low, high)
        if key not in known:
            rows = [values.relative_error(low * share, high * share, symmetric, bits).double().cumsum(0) for share in CLIP_CANDIDATES]
            known[key] = torch.nn.functional.pad(torch.stack(rows), (1, 0))
        return known[key]

    errors = torch.full((V, V), torch.inf, dtype=torch.float64)
    for first in range(V):
        low, high = values.low[first:].cummin(0).values.tolist(), values.high[first:].cummax(0).values.tolist()
        for last in range(first, V):
            sums = errors_up_to(low[last - first], high[last - first])
            errors[first, last] = (sums[:, last + 1] - sums[:, first]).min()
    return errors
