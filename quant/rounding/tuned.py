"""A 4-bit Linear whose codes and scales are both in training, for the output of a whole UNet. Trains nothing itself (tuning/training.py).

Source: QuEST (arXiv 2402.03666) fine-tunes the float weights before rounding of few layers, and scales, by Adam. Differences: a weight
is learned as its place between codes, so that one rate fits layers of any size; the scales are those of its output channels, since
scales of activations follow the rows here.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..int4 import Int4Weight
from .block import RoundedLinear

# Natural logarithm that a scale moves by where a weight moves by one code: scales count for all weights of a channel at once.
SCALE_SHARE = 0.1
# fp32 tensors of a weight's size that training one takes: place, step, move, its gradient, Adam's two moments, the weight itself.
COPIES = 7


class TunedLinear(RoundedLinear):
    """move: (N, K), codes that each weight moves by. stretch: (N,), SCALE_SHARE times the logarithm of the scales' factor.

    levels: if not None, inputs are rounded to so many codes either side of 0, one scale for each row, as the kernels do.
    """

    def __init__(self, linear: nn.Linear, start: Int4Weight, levels: int | None = None) -> None:
        """linear: has the float weight. start: codes to begin with, scales and branch."""
        super().__init__(linear, start)
        self.stretch = nn.Parameter(torch.zeros_like(start.scale))
        self._levels = levels

    def forward(self, x: Tensor) -> Tensor:
        weight = self.soft_codes() * self.step * (SCALE_SHARE * self.stretch).exp()[:, None]
        y = F.linear(self._rounded(x), weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        branch = self._start.branch
        return y if branch is None else y + F.linear(F.linear(x, branch.down.to(x.dtype)), branch.up.to(x.dtype))

    def result(self) -> Int4Weight:
        scale = self._start.scale * (SCALE_SHARE * self.stretch.detach()).exp()
        return replace(super().result(), scale=scale)

    def _rounded(self, x: Tensor) -> Tensor:
        if self._levels is None:
            return x
        scale = x.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / self._levels
        return x + ((x.detach() / scale).round() * scale - x.detach())
