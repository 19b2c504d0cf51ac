"""Closed-form corrections of a UNet's noise estimate and input, one per timestep bucket and latent channel. Runs no model.

estimate* = (estimate - offset) * gain, and before the call input* = input - input_bias. PTQD (arXiv 2305.10657): the error of the
estimate is k * noise + rest; offset = mean of the rest, gain = 1 / (1 + max(k, 0)). TAC-Diffusion (arXiv 2407.03917), noise-estimation
reconstruction: the gain that minimises (1 - l1) |e - K ê|² + l1 N |(e - K ê) / e|² + l2 N (K - 1)², only where |ê| is large; and
input-bias correction: the mean by which the quantized model's own sampling has drifted. PTQD's third part, less noise in
stochastic samplers, needs another sampler and is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..timestep import NUM_BUCKETS

CHANNELS = 4
# A third party's values of TAC-Diffusion's constants (no official code): lambda 1 is 0.5 to 0.8 there, the mask 1 to 4.
RELATIVE_WEIGHT, PULL_TO_ONE, MASK = 0.5, 0.1, 1.0
# Relative errors count values as if they were no smaller than this share of their channel's root mean square: 1 / e has no mean.
SMALLEST_SHARE = 0.1


@dataclass(frozen=True)
class OutputCorrection:
    """gain, offset, input_bias: (64, 4) fp32. mask: the gain holds where |estimate| > mask * its channel's mean; 0: everywhere."""

    gain: Tensor
    offset: Tensor
    input_bias: Tensor
    mask: float = 0.0

    def correct_input(self, x: Tensor, bucket: Tensor) -> Tensor:
        """x: (B, C, h, w) of any C >= 4, whose first four are the latent; left unchanged. bucket: (B,) int64 on the tables' device."""
        bias = self.input_bias.index_select(0, bucket).to(x.dtype)[:, :, None, None]
        return torch.cat([x[:, :CHANNELS] - bias, x[:, CHANNELS:]], 1)

    def correct_output(self, estimate: Tensor, bucket: Tensor) -> Tensor:
        """estimate: (B, 4, h, w); left unchanged. bucket: as above."""
        gain, offset = (table.index_select(0, bucket)[:, :, None, None] for table in (self.gain, self.offset))
        shifted = estimate.float() - offset
        if self.mask:
            large = shifted.abs() > self.mask * shifted.abs().mean((2, 3), keepdim=True)
            gain = torch.where(large, gain, 1.0)
        return (shifted * gain).to(estimate.dtype)

    def on(self, device: torch.device) -> OutputCorrection:
        return OutputCorrection(self.gain.to(device), self.offset.to(device), self.input_bias.to(device), self.mask)

    @cached_property
    def touches_input(self) -> bool:
        return bool(self.input_bias.any())


class OutputStatistics:
    """Sums over pairs of a reference noise estimate and a quantized one, per bucket and channel."""

    def __init__(self) -> None:
        self.count = torch.zeros(NUM_BUCKETS, dtype=torch.float64)  # values of one channel
        names = ("e", "q", "ee", "qq", "eq", "q_over_e", "qq_over_ee")
        self._sums = {name: torch.zeros(NUM_BUCKETS, CHANNELS, dtype=torch.float64) for name in names}

    def add(self, reference: Tensor, estimate: Tensor, bucket: Tensor) -> None:
        """reference, estimate: (B, 4, h, w). bucket: (B,) int64. Any device."""
        e, q, bucket = reference.detach().double().cpu(), estimate.detach().double().cpu(), bucket.cpu()
        floor = SMALLEST_SHARE * e.square().mean((2, 3), keepdim=True).sqrt().clamp_min(1e-12)
        safe = torch.where(e.abs() < floor, floor.copysign(e), e)
        values = {"e": e, "q": q, "ee": e * e, "qq": q * q, "eq": e * q, "q_over_e": q / safe, "qq_over_ee": (q / safe) ** 2}
        for name, value in values.items():
            self._sums[name].index_add_(0, bucket, value.sum((2, 3)))
        self.count.index_add_(0, bucket, torch.full(bucket.shape, float(e[0, 0].numel()), dtype=torch.float64))

    def ptqd(self) -> OutputCorrection:
        """k of each bucket by regression over all channels, each with its own mean; that mean of what k leaves."""
        sums, count = self._sums, self.count[:, None].clamp_min(1)
        together = sums["eq"] - sums["ee"] - (sums["q"] - sums["e"]) * sums["e"] / count
        k = together.sum(1) / (sums["ee"] - sums["e"].square() / count).sum(1).clamp_min(1e-12)
        mean = (sums["q"] - (1 + k[:, None]) * sums["e"]) / count
        gain = (1 / (1 + k.clamp_min(0)))[:, None].expand(-1, CHANNELS)
        return self._correction(gain, mean, 0.0)

    def reconstruction(
        self, relative_weight: float = RELATIVE_WEIGHT, pull_to_one: float = PULL_TO_ONE, mask: float = MASK
    ) -> OutputCorrection:
        """TAC-Diffusion's gain. With both weights 0 and no mask it is the least-squares gain of each channel."""
        sums, N = self._sums, self.count[:, None]
        plain, relative, pull = 1 - relative_weight, relative_weight * self._energy(), pull_to_one * N * self._energy()
        above = plain * sums["eq"] + relative * sums["q_over_e"] + pull
        below = plain * sums["qq"] + relative * sums["qq_over_ee"] + pull
        gain = torch.where(below > 0, above / below.clamp_min(1e-12), 1.0)
        return self._correction(gain, torch.zeros_like(gain), mask)

    def _energy(self) -> Tensor:
        """Mean square of the reference: makes the relative and pulling terms comparable whatever the latent's unit."""
        return self._sums["ee"] / self.count[:, None].clamp_min(1)

    def _correction(self, gain: Tensor, offset: Tensor, mask: float) -> OutputCorrection:
        nearest = spread_visited(self.count)
        return OutputCorrection(gain[nearest].float(), offset[nearest].float(), torch.zeros(NUM_BUCKETS, CHANNELS), mask)


def spread_visited(count: Tensor) -> Tensor:
    """(64,) int64: of each bucket the nearest one whose count is not 0, the lower of two. All of them if none was visited."""
    visited = count.nonzero().flatten()
    if not len(visited):
        return torch.arange(NUM_BUCKETS)
    return visited[(visited[None] - torch.arange(NUM_BUCKETS)[:, None]).abs().argmin(1)]


def with_input_bias(correction: OutputCorrection, drift: Tensor, count: Tensor) -> OutputCorrection:
    """The same with TAC-Diffusion's input bias. drift: (64, 4) sums over images of the mean drift. count: (64,) images."""
    mean = (drift / count[:, None].clamp_min(1))[spread_visited(count)]
    return OutputCorrection(correction.gain, correction.offset, mean.float(), correction.mask)


def identity_correction() -> OutputCorrection:
    """Changes nothing."""
    zeros = torch.zeros(NUM_BUCKETS, CHANNELS)
    return OutputCorrection(torch.ones(NUM_BUCKETS, CHANNELS), zeros, zeros.clone())
