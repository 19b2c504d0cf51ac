"""Channel groups: which input channels share an activation scale, in what order, at what power-of-two ratio. Runs no layer.

x[:, order[j]] ≈ (codes[:, j] - zero_point) * base_scale * 2^exponent[j]
Order and exponents are fixed per layer; the base scale and zero point follow the token, image or timestep group.
Choosing between this and the other activation modes: activation_choice.py. The paper's k-means groups: kmeans_groups.py.
Source: DGQ (arXiv 2501.04304), section 4.1, outlier-preserving groups of channels. Differs from it: channels are sorted and cut
at whole blocks instead of clustered by k-means, and scales have power-of-two ratios, so that one int32 sum can be shifted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SchemeError
from .observer import LayerStatistics
from .scheme import GRANULARITIES
from .weight import INT8_MAX, QuantizedWeight, quantize_weight

# Ratio of the largest group's scale to the smallest's: 2^12 is more than int8 codes of one layer can use.
MAX_EXPONENT = 12
# Positions of the scale grid within one octave that are tried; finer ones gain less than 0.1 dB.
OFFSETS = 8
INT32_MAX = 2**31 - 1
# Stored ranges of channel groups are widened by this: a group's few channels were seen in less than the whole layer's, and other
# prompts go beyond. Demo model, ff.net.2 alone on prompts that were not calibrated on: 43.9 dB without, 46.2 dB with 1.25, 46.5 dB
# with 1.5, 45.1 dB with 2; one scale for all channels 48.6 dB. Recorded rows alone, which hold few outliers, favoured the groups.
HEADROOM = 1.5


@dataclass(frozen=True)
class ChannelGrouping:
    """order: (K,) int32, the channel at each stored position. exponents: (ceil(K / granularity),) int8, one per block of
    `granularity` positions, from largest to smallest; the last is 0."""

    order: Tensor
    exponents: Tensor
    granularity: int

    @property
    def groups(self) -> int:
        """Effective number of groups: blocks with equal exponents are one group."""
        return len(self.exponents.unique())

    def by_position(self) -> Tensor:
        """(K,) int64: the exponent of every stored position."""
        return self.exponents.long().repeat_interleave(self.granularity)[: len(self.order)]

    def by_channel(self) -> Tensor:
        """(K,) int64: the exponent of every channel in the model's order."""
        exponents = torch.empty_like(self.order, dtype=torch.long)
        exponents[self.order.long()] = self.by_position()
        return exponents

    def apply(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., K) fp32 in stored order, divided by 2^exponent: all groups then share one scale."""
        return x.index_select(-1, self.order.long()).float() * torch.exp2(-self.by_position().float())

    def undo(self, x: Tensor) -> Tensor:
        """Inverse of apply."""
        out = torch.empty_like(x)
        out[..., self.order.long()] = x * torch.exp2(self.by_position().to(x.dtype))
        return out


def max_groups(K: int, granularity: int) -> int:
    """How many groups K channels can make: only the last may be smaller than `granularity`."""
    return max(1, -(-K // granularity))


def check_group_count(layer: str, K: int, groups: int, granularity: int) -> None:
    """Raise SchemeError naming the layer if it cannot be cut into so many groups."""
    if groups > max_groups(K, granularity):
        raise SchemeError(
            f"{layer}: {groups} channel groups of {granularity} channels or more need {(groups - 1) * granularity + 1} input channels, "
            f"it has {K}. Choose at most {max_groups(K, granularity)} groups, or a smaller granularity."
        )


def group_channels(magnitude: Tensor, energy: Tensor, groups: int, granularity: int, layer: str) -> ChannelGrouping:
    """The order and exponents with the least predicted noise at the layer's output.

    Channels are sorted by magnitude and cut into blocks. With base scale s, a block of exponent e makes noise in proportion
    to s^2 4^e times its weights' energy; a block's exponent is the smallest chosen level that holds its peak. The best
    subset of at most `groups` levels is found by dynamic programming, for OFFSETS positions of the scale grid.
    Args:
        magnitude: (K,) >= 0, the largest |x| to be held per channel. energy: (K,), sum of squares of each channel's weights.
        groups: at most so many; fewer come out where more would not help.
    Raises: SchemeError if K channels do not make so many groups.
    """
    K = len(magnitude)
    check_group_count(layer, K, groups, granularity)
    order = magnitude.argsort(descending=True, stable=True)
    blocks = max_groups(K, granularity)
    padding = blocks * granularity - K
    peak = torch.nn.functional.pad(magnitude[order].double(), (0, padding)).view(blocks, granularity).amax(1)
    weight = torch.nn.functional.pad(energy[order].double(), (0, padding)).view(blocks, granularity).sum(1)
    # In octaves below the largest: 0 for the first block, ascending.
    depth = -(peak / peak[0].clamp_min(1e-30)).clamp_min(2.0**-MAX_EXPONENT).log2()
    best, least = torch.zeros(blocks, dtype=torch.int8), math.inf
    for step in range(OFFSETS):
        noise, levels = _best_levels(depth, weight, groups, step / OFFSETS)
        if noise < least:
            least, best = noise, levels
    return ChannelGrouping(order.int(), best, granularity)


def _best_levels(depth: Tensor, weight: Tensor, groups: int, offset: float) -> tuple[float, Tensor]:
    """Exponents (blocks,) on the grid top * 2^(offset - n), and the predicted noise relative to top^2."""
    # n octaves below the grid's top; 1e-9 keeps exact powers of two on their level.
    level = (depth + offset + 1e-9).floor().long()
    present = level.unique().tolist()  # ascending: present[0] holds the first block
    mass = [float(weight[level == n].sum()) for n in present]
    # cost[g]: least noise of the levels seen so far with g of them chosen; the last chosen one takes all until the next.
    cost: list[list[float]] = [[math.inf] * (groups + 1) for _ in present]
    previous: list[list[int]] = [[-1] * (groups + 1) for _ in present]
    above = torch.tensor([0.0, *mass]).cumsum(0).tolist()
    cost[0][1] = 0.0
    for i in range(1, len(present)):
        for g in range(2, groups + 1):
            for j in range(i):
                held = cost[j][g - 1] + (above[i] - above[j]) * 4.0 ** -present[j]
                if held < cost[i][g]:
                    cost[i][g], previous[i][g] = held, j
    ends = [(cost[i][g] + (above[-1] - above[i]) * 4.0 ** -present[i], i, g) for i in range(len(present)) for g in range(1, groups + 1)]
    _, i, g = min(ends)
    chosen = []
    while i >= 0:
        chosen.append(present[i])
        i, g = previous[i][g], g - 1
    chosen.reverse()
    held_by = torch.tensor(chosen)[torch.searchsorted(torch.tensor(chosen), level, right=True) - 1]
    exponents = held_by.max() - held_by
    # What the base scale really is: the tightest block decides, not the grid.
    scale = float((-depth - exponents).exp2().max())
    return scale**2 * float((weight * 4.0**exponents).sum()), exponents.to(torch.int8)


def channel_magnitude(statistics: LayerStatistics) -> Tensor:
    """(K,): the largest |x| of each channel that calibration saw, over all timesteps."""
    return torch.maximum(statistics.range_min.abs(), statistics.range_max.abs()).amax(0)


def grouped_statistics(statistics: LayerStatistics, grouping: ChannelGrouping, headroom: float = HEADROOM) -> LayerStatistics:
    """The statistics that a layer would have if its input came in stored order, divided by 2^exponent; ranges times headroom."""
    rows = grouping.apply(statistics.rows)
    return LayerStatistics(
        buckets=statistics.buckets,
        count=statistics.count,
        range_min=headroom * grouping.apply(statistics.range_min),
        range_max=headroom * grouping.apply(statistics.range_max),
        token_absmax=statistics.token_absmax,
        rows=rows,
        row_bucket=statistics.row_bucket,
    )


def weight_energy(weight: Tensor) -> Tensor:
    """(N, K) or (Cout, Cin, kh, kw) -> (K,) fp32: sum of squares of the weights that meet each input channel."""
    return weight.detach().float().square().transpose(0, 1).flatten(1).sum(1)


def within_int32(grouping: ChannelGrouping, codes: Tensor, symmetric: bool) -> ChannelGrouping:
    """The grouping itself, or one whose exponents are cut until no sum of the layer can pass 2^31.

    The worst sum is max_n sum_k |codes[n, k]| 2^exponent[k] times the largest |code - zero_point|, 127 or 255.
    Args: codes: int8 weight codes in stored order, (N, K) or (Cout, kh, kw, Cin).
    """
    per_channel = _absolute_sums(codes)
    limit = int(grouping.exponents.max())
    while limit > 0:
        exponents = (grouping.exponents - (grouping.exponents.max() - limit)).clamp_min(0)
        cut = ChannelGrouping(grouping.order, exponents, grouping.granularity)
        factor = torch.bitwise_left_shift(torch.ones_like(cut.by_position()), cut.by_position())
        if int((per_channel * factor.to(codes.device)).sum(1).max()) * _largest_difference(symmetric) <= INT32_MAX:
            return cut
        limit -= 1
    return ChannelGrouping(grouping.order, torch.zeros_like(grouping.exponents), grouping.granularity)


def _absolute_sums(codes: Tensor) -> Tensor:
    """(N, K) or (Cout, kh, kw, Cin) int8 -> (N, K) int64: sum of |code| over the taps."""
    return codes.long().abs().flatten(1, -2).sum(1) if codes.ndim == 4 else codes.long().abs()


def _largest_difference(symmetric: bool) -> int:
    """Of an activation's code and its zero point."""
    return 127 if symmetric else 255


def regrouped_weight(weight: Tensor, grouping: ChannelGrouping, symmetric: bool, layer: str) -> QuantizedWeight:
    """Codes of another weight (a LoRA merged, two models mixed) for a layer whose groups are fixed, in their order.

    A layer's activation tables are in units of its groups' base scale, so exponents cannot be cut as within_int32 does it:
    a row whose sums could pass 2^31 gets a larger scale instead.
    Args: weight: (N, K) or (Cout, Cin, kh, kw), any float dtype; left unchanged. symmetric: activations have no zero point.
    Raises: WeightError if the weight is not finite.
    """
    quantized = quantize_weight(weight, layer)
    codes, scale = quantized.codes, quantized.scale
    rows = (weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight).float()
    factor = torch.bitwise_left_shift(torch.ones_like(grouping.by_channel()), grouping.by_channel()).to(codes.device)
    limit = INT32_MAX // _largest_difference(symmetric)
    while True:
        excess = (_absolute_sums(codes) * factor).sum(1) / limit  # (N,)
        if bool((excess <= 1).all()):
            return QuantizedWeight(codes[..., grouping.order.long().to(codes.device)].contiguous(), scale)
        # 1 % more than the sums ask for: rounding may bring them back up.
        scale = torch.where(excess > 1, scale * excess.float() * 1.01, scale)
        codes = (rows / scale.view(-1, *[1] * (rows.ndim - 1))).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


def granularity_of(K: int, blocks: int) -> int:
    """The granularity at which K channels make so many blocks.

    It is the only one, unless there is one block: then the largest, as all are the same grouping.
    """
    return next(granularity for granularity in sorted(GRANULARITIES, reverse=True) if max_groups(K, granularity) == blocks)


def stored_grouping(order: Tensor, exponents: Tensor, granularity: int) -> ChannelGrouping | None:
    """The grouping of a file's tensors; None if they are no permutation or no descending exponents down to 0."""
    K = len(order) if order.ndim == 1 else 0
    fits = K > 0 and exponents.shape == (max_groups(K, granularity),) and order.dtype is torch.int32 and exponents.dtype is torch.int8
    if not fits or not torch.equal(order.long().sort().values, torch.arange(K, device=order.device)):
        return None
    steps = exponents[:-1].int() - exponents[1:].int()
    if bool((steps < 0).any()) or int(exponents[-1]) != 0 or int(exponents[0]) > MAX_EXPONENT:
        return None
    return ChannelGrouping(order, exponents, granularity)
