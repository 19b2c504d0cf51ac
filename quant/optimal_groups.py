"""Timestep groups with the least predicted error: exact dynamic programming over contiguous segments. Measures nothing itself.

best[g, j] = min over i of best[g - 1, i - 1] + errors[i, j], the last group being the buckets i..j.
The paper's groups (ADP-DM, arXiv 2305.18723) need not be contiguous and are learned; ranges drift smoothly along the
schedule, so runs lose little, and for runs the least error is found exactly in V^2 G steps (compare group_search.py).
"""

from __future__ import annotations

import torch
from torch import Tensor


def optimal_segments(errors: Tensor, groups: int) -> list[int]:
    """Group of each of V buckets, at most `groups` contiguous ones, that minimises the sum of the segments' errors.

    Args:
        errors: (V, V) float64, entry [i, j] for the segment i..j; inf for j < i (range_error.segment_errors).
    Returns: V group numbers, ascending from 0.
    """
    V = errors.shape[0]
    groups = min(groups, V)
    best = errors[0].clone()  # (V,): least error of buckets 0..j with the groups so far
    starts = [torch.zeros(V, dtype=torch.long)]
    for _ in range(1, groups):
        before = torch.cat([best.new_tensor([torch.inf]), best[:-1]])  # before[i]: buckets 0..i-1
        held, start = (before[:, None] + errors).min(0)
        # Fewer groups serve as well where more bring nothing: the start 0 stands for "no cut here".
        starts.append(torch.where(held < best, start, -1))
        best = torch.minimum(held, best)
    return _walk_back(starts, V)


def _walk_back(starts: list[Tensor], V: int) -> list[int]:
    cuts, last = [], V - 1
    for start in reversed(starts):
        first = int(start[last])
        if first > 0:
            cuts.append(first)
            last = first - 1
    return [sum(bucket >= cut for cut in cuts) for bucket in range(V)]
