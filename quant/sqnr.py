"""Signal-to-quantization-noise ratio, in dB."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sqnr_db(reference: Tensor, test: Tensor) -> float:
    """10 log10(|reference|^2 / |test - reference|^2); inf if equal, -inf if `test` is not finite.

    Source: Efficient Quantization Strategies for Latent Diffusion Models, arXiv 2312.05431.
    """
    signal, noise = _energies(reference, test)
    return _decibels(signal, noise)


class StepSqnr:
    """SQNR per sampler step: energies are summed over prompts, then turned into dB."""

    def __init__(self) -> None:
        self._energies: dict[int, list[float]] = {}

    def add(self, step: int, reference: Tensor, test: Tensor) -> None:
        signal, noise = _energies(reference, test)
        sums = self._energies.setdefault(step, [0.0, 0.0])
        sums[0] += signal
        sums[1] += noise

    def per_step_db(self) -> list[float]:
        return [_decibels(*self._energies[step]) for step in sorted(self._energies)]

    def mean_db(self) -> float:
        """Mean of the dB values over steps; nan if nothing was added."""
        values = self.per_step_db()
        return sum(values) / len(values) if values else math.nan

    def worst_db(self) -> float:
        return min(self.per_step_db(), default=math.nan)


def _energies(reference: Tensor, test: Tensor) -> tuple[float, float]:
    reference, test = reference.detach().double(), test.detach().double()
    noise = torch.sum((test - reference) ** 2).item()
    return torch.sum(reference**2).item(), noise if math.isfinite(noise) else math.inf


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    if signal == 0 or math.isinf(noise):
        return -math.inf
    return 10 * math.log10(signal / noise)
