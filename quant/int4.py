"""4-bit weights: symmetric, groups of 64 along K with two-level scales, plain rounding. Better rounding is in rounding/.

w[n, k] ≈ scale[n] * group_scale[g, n] * code[n, k], g = k // 64, code in [-8, 7], group_scale an integer in [-15, 15] but 0.
Its sign lets code -8, which 7 has no match for, stand for a group's largest weight, whichever sign that has: 1.0 dB more than
codes in [-7, 7] on N(0, 1). code * group_scale is an int8, so products stay integer up to the one scale of each channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import WeightError
from .weight import check_weight

if TYPE_CHECKING:
    from .low_rank import LowRank

GROUP_SIZE = 64
CODE_MIN, CODE_MAX = -8, 7
# 8 * 15 = 120 is an int8. Scales of 4 bits lose 0.05 dB against fp32 ones on N(0, 1) and on the demo model's weights.
MAX_GROUP_SCALE = 15
# fp16's smallest normal number: a channel of zeros gets it divided by the largest product.
TINY = 2.0**-14
# Of the scale that maps a group's largest weight to code -8: clipping it a little, or the rounding of group_scale, may be better.
SCALE_CANDIDATES = (0.8, 0.87, 0.93, 1.0, 1.07, 1.14)
# Rows that are searched at a time: temporaries of a few MiB.
ROWS_PER_BLOCK = 256


@dataclass(frozen=True)
class Int4Weight:
    """codes: (N, K) int8 in [-8, 7]. group_scale: (K / 64, N) int8 in [-15, 15], not 0. scale: (N,) fp32 > 0.

    branch: runs beside the codes, which then stand for what it leaves of the weight; None for none.
    """

    codes: Tensor
    group_scale: Tensor
    scale: Tensor
    branch: LowRank | None = None

    def step(self) -> Tensor:
        """(N, K / 64) fp32: the weight of one code of each group, with its sign."""
        return self.group_scale.t().float() * self.scale[:, None]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K), the branch included."""
        weight = (in_groups(self.codes).float() * self.step()[:, :, None]).view(self.codes.shape)
        return (weight if self.branch is None else weight + self.branch.dense()).to(dtype)

    def to(self, device: torch.device | str) -> Int4Weight:
        branch = None if self.branch is None else self.branch.to(device)
        return Int4Weight(*(part.to(device) for part in (self.codes, self.group_scale, self.scale)), branch)

    def packed(self) -> Tensor:
        """(N, ceil(K / 128) * 64) uint8: byte j of block b holds code + 8 of channel 128 b + j in its low nibble and of
        channel 128 b + 64 + j in its high one, or 8 past the end."""
        nibbles = in_groups(self.codes + 8).to(torch.uint8)  # (N, G, 64)
        if nibbles.shape[1] % 2:
            nibbles = torch.cat([nibbles, torch.full_like(nibbles[:, :1], 8)], 1)
        return (nibbles[:, ::2] | nibbles[:, 1::2] << 4).flatten(1).contiguous()


def int8_codes(qweight: Tensor, group_scale: Tensor) -> Tensor:
    """code * group_scale, (N, K) int8, of a packed weight and its stored group scales: the same weight with 8 bits, exactly."""
    return (in_groups(unpacked(qweight, group_scale.shape[0])) * group_scale.t()[:, :, None]).flatten(1)


def unpacked(qweight: Tensor, groups: int) -> Tensor:
    """Inverse of Int4Weight.packed: codes (N, 64 * groups) int8."""
    blocks = qweight.unflatten(1, (-1, GROUP_SIZE))
    nibbles = torch.stack([blocks & 15, blocks >> 4], 2).flatten(1, 2)[:, :groups]  # (N, G, 64)
    return (nibbles.to(torch.int8) - 8).flatten(1)


def can_be_int4(shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape can have 4 bits: a Linear's with whole groups of input channels."""
    return len(shape) == 2 and shape[1] % GROUP_SIZE == 0


def check_int4(weight: Tensor, layer: str) -> None:
    """Raise WeightError naming the layer unless the weight can have 4 bits and is finite."""
    if weight.ndim != 2:
        raise WeightError(f"{layer}: a convolution's weight {tuple(weight.shape)}; 4 bits are for Linears. Choose int8 for this layer.")
    if weight.shape[1] % GROUP_SIZE:
        raise WeightError(f"{layer}: K = {weight.shape[1]} is no multiple of group_size {GROUP_SIZE}. Choose int8 for this layer.")
    check_weight(weight, layer)


def quantize_int4(weight: Tensor, layer: str, importance: Tensor | None = None) -> Int4Weight:
    """Round a weight to the nearest codes of the group scales that lose least.

    Args:
        weight: (N, K), any float dtype; left unchanged.
        layer: name for error messages.
        importance: (K,) fp32 >= 0, what a squared error of each input channel counts (its mean square); None for all the same.
    Raises: WeightError if K is no multiple of 64, or the weight is not finite or not a Linear's.
    """
    check_int4(weight, layer)
    scale = channel_scale(weight)
    parts = [_search(*block, importance) for block in zip(weight.split(ROWS_PER_BLOCK), scale.split(ROWS_PER_BLOCK), strict=True)]
    return Int4Weight(torch.cat([codes for codes, _ in parts]), torch.cat([group for _, group in parts]).t().contiguous(), scale)


def channel_scale(weight: Tensor) -> Tensor:
    """(N,) fp32: the channel's largest weight over the largest int8 that a code can stand for."""
    return weight.abs().amax(1).float().clamp_min(TINY) / (-CODE_MIN * MAX_GROUP_SCALE)


def group_scales(weight: Tensor, scale: Tensor, importance: Tensor | None = None) -> Tensor:
    """The group scales that lose least when weights are rounded to nearest.

    Args: weight: (N, K) fp32. scale: (N,). importance: (K,) or None.
    Returns: (N, K / 64) fp32, whole numbers.
    """
    groups = in_groups(weight)
    counts = None if importance is None else in_groups(importance[None])
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))  # (N, G, 1)
    ideal = -extreme / (-CODE_MIN * scale[:, None, None])
    best, least = torch.ones_like(ideal), torch.full_like(ideal, torch.inf)
    for share in SCALE_CANDIDATES:
        candidate = (ideal * share).round().abs().clamp(1, MAX_GROUP_SCALE).copysign(ideal)
        step = candidate * scale[:, None, None]
        error = (groups / step).round_().clamp_(CODE_MIN, CODE_MAX).mul_(step).sub_(groups).square_()
        error = (error if counts is None else error * counts).sum(2, keepdim=True)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best.squeeze(2)


def in_groups(matrix: Tensor) -> Tensor:
    """(N, K) -> (N, K / 64, 64)."""
    return matrix.unflatten(1, (-1, GROUP_SIZE))


def _search(weight: Tensor, scale: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes (N, K) and group scales (N, K / 64) of some rows, int8."""
    weight = weight.float()
    group = group_scales(weight, scale, importance)
    step = (group * scale[:, None])[:, :, None]
    codes = (in_groups(weight) / step).round_().clamp_(CODE_MIN, CODE_MAX).view(weight.shape)
    return codes.to(torch.int8), group.to(torch.int8)
