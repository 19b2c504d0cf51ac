"""DGQ's own channel groups, by k-means on channel ranges: for comparison with channel_group.py, in float simulation only.

Groups of any size and scales of any ratio do not fit one integer sum: this is what the power-of-two groups are measured against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ITERATIONS = 50


@dataclass(frozen=True)
class RangeGroups:
    """label: (K,) int64, each channel's group. low, high: (G,) fp32, each group's range."""

    label: Tensor
    low: Tensor
    high: Tensor

    def quantized(self, x: Tensor, bits: int) -> Tensor:
        """x (R, K) as its codes hold it: asymmetric, s = (high - low) / (2^bits - 1), z = round(-low / s), clamped to the codes."""
        last = 2**bits - 1
        scale = ((self.high - self.low) / last).clamp_min(1e-8)[self.label]
        zero_point = (-self.low[self.label] / scale).round()
        return ((x / scale + zero_point).round().clamp(0, last) - zero_point) * scale


def kmeans_groups(low: Tensor, high: Tensor, groups: int, seed: int = 0) -> RangeGroups:
    """Cluster channels by the points (low, high) and give each cluster the range of its members.

    Args: low, high: (K,) fp32, each channel's extremes at one timestep.
    Source: DGQ (arXiv 2501.04304), section 4.1. Differs from the official code: own Lloyd iterations from a k-means++ start
    instead of scikit-learn's, and fewer clusters instead of an empty one.
    """
    points = torch.stack([low, high], 1).double()  # (K, 2)
    centres = _spread_start(points, groups, torch.Generator().manual_seed(seed))
    label = torch.cdist(points, centres).argmin(1)
    for _ in range(ITERATIONS):
        members = torch.nn.functional.one_hot(label, len(centres)).double()  # (K, G)
        count = members.sum(0)
        moved = (members.t() @ points) / count.clamp_min(1)[:, None]
        centres = torch.where(count[:, None] > 0, moved, centres)
        before, label = label, torch.cdist(points, centres).argmin(1)
        if torch.equal(before, label):
            break
    used, label = label.unique(return_inverse=True)
    lowest = torch.stack([low[label == group].min() for group in range(len(used))])
    highest = torch.stack([high[label == group].max() for group in range(len(used))])
    return RangeGroups(label, lowest, highest)


def _spread_start(points: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is drawn with probability proportional to the squared distance to the nearest one so far."""
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < groups:
        distance = torch.cdist(points, centres).amin(1).square()
        if not bool((distance > 0).any()):
            break
        centres = torch.cat([centres, points[torch.multinomial(distance, 1, generator=generator)]])
    return centres
