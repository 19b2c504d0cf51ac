"""Channel groups as the kernels take them: order, scale ratios, borders along K. Which channels: quant/channel_group.py.

x[m, order[j]] ≈ (codes[m, j] - zero_point[m]) * scale[m] * 2^exponent[j]
acc[m, n] = sum_j codes[m, j] * qweight[n, j] * 2^exponent[j]: one int32 sum, shifted left at each border, since exponents
descend along K and their ratios are powers of two (Horner's rule). Zero points are the same code in every group, so that one
vector sum_j 2^exponent[j] * qweight[n, j] puts them right.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ..errors import LayoutError

# The kernels' step along K may not cross a border, and the int8 tensor core instruction takes 32 channels at a time.
MIN_KERNEL_GRANULARITY = 32
logger = logging.getLogger(__name__)
Borders = tuple[tuple[int, int, int], ...]  # (start, end, shift) of each group along K


@dataclass(frozen=True)
class ChannelGroups:
    """All on the layer's device; made once per layer by channel_groups().

    order: (K,) int32, the input channel at each stored position.
    position_factor, channel_factor: (K,) fp32, 2^-exponent by stored position and by input channel.
    ends: (G,) int32, where each group ends along K, in multiples of granularity; -1 for the last, which ends with K.
    shifts: (G,) int32 >= 0, what the sum is shifted by at each group's end; the last is 0.
    borders: (start, end, shift) of each group, the same on the host. granularity: channels per block.
    """

    order: Tensor
    position_factor: Tensor
    channel_factor: Tensor
    ends: Tensor
    shifts: Tensor
    borders: Borders
    granularity: int

    @property
    def channels(self) -> int:
        """K."""
        return self.order.shape[0]

    @property
    def runs_in_kernels(self) -> bool:
        return self.granularity >= MIN_KERNEL_GRANULARITY

    @property
    def exponents(self) -> Tensor:
        """(ceil(K / granularity),) int8 on the CPU: what channel_groups() was given."""
        levels, exponent = [], 0
        for start, end, shift in reversed(self.borders):
            exponent += shift
            levels = [exponent] * -(-(end - start) // self.granularity) + levels
        return torch.tensor(levels, dtype=torch.int8)

    def to(self, device: torch.device) -> ChannelGroups:
        """The same groups on a device; itself if they are there."""
        if self.order.device == device:
            return self
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def needs_reference(self) -> bool:
        """Whether the reference has to run in a kernel's place, which is said once for each granularity."""
        if not self.runs_in_kernels:
            _say_reference_runs(self.granularity)
        return not self.runs_in_kernels

    def check(self, operation: str, K: int) -> None:
        """Raise LayoutError unless these are groups of K channels."""
        if self.channels != K:
            raise LayoutError(f"{operation}: groups of {self.channels} channels for an input of {K}; pass the groups of this layer.")


@cache
def _say_reference_runs(granularity: int) -> None:
    logger.warning(
        "StepQuant: channel groups of %d channels run in plain torch, which is slow on a GPU; the kernels take blocks of %d or more. "
        "Plan with granularity 64 for speed.",
        granularity,
        MIN_KERNEL_GRANULARITY,
    )


def channel_groups(order: Tensor, exponents: Tensor, granularity: int) -> ChannelGroups:
    """The kernels' tables of a layer; waits for the device, so make them once.

    Args: order: (K,) int32. exponents: (ceil(K / granularity),) integers, descending, the last 0.
    """
    K, device = order.shape[0], order.device
    levels = exponents.to("cpu", torch.int64)
    changes = [block + 1 for block in range(len(levels) - 1) if levels[block] != levels[block + 1]]
    ends = [block * granularity for block in changes] + [K]
    steps = [int(levels[block - 1] - levels[block]) for block in changes] + [0]
    factor = torch.exp2(-levels.float()).repeat_interleave(granularity)[:K].to(device)
    by_channel = torch.empty_like(factor)
    by_channel[order.long()] = factor
    table = torch.tensor([[*ends[:-1], -1], steps], dtype=torch.int32, device=device)
    borders = tuple(zip([0, *ends[:-1]], ends, steps, strict=True))
    return ChannelGroups(order, factor, by_channel, table[0].clone(), table[1].clone(), borders, granularity)


def shifted_codes(qweight: Tensor, groups: ChannelGroups) -> Tensor:
    """qweight[..., j] * 2^exponent[j], int32: sums of these are what a zero point is multiplied with.

    Args: qweight: int8 (..., K), stored order.
    """
    return qweight.int() * groups.position_factor.reciprocal().int()
