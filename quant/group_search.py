"""ADP-DM's search for timestep groups: a softmax over G quantizers per timestep, trained with them. Local to a layer, not end to end.

x̂ = sum_g w_g(t) Q_g(x), w(t) = softmax(a(t) / temperature); minimise |x - x̂|^2 + lambda sum_g -w_g ln w_g over a and the
ranges of the Q_g; then every timestep takes its argmax.
Source: ADP-DM (arXiv 2305.18723), group-wise quantization with differentiable search. The paper's first term is the loss of
the noise estimate through the whole network; here it is the layer's own relative error on its recorded values, in units
of its value at the start, which needs no network. The entropy is over the groups of a timestep, as the paper has it (the
released code sums over channels). The temperature falls, so that the argmax means what the weights say. Final ranges come from
the members of each group (calibration.tables).

What the mixture rewards is not what is deployed: the mean of several quantizers has less rounding error than any of them, so
weights stay spread. `expected_error` weighs each quantizer's own error instead, which has no such reward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .range_error import BucketValues

ENTROPY_WEIGHT = 0.8  # lambda in the paper
LEARNING_RATE = 0.02  # the released code has 0.05, where ranges overshoot and timesteps crowd into one group
FIRST_TEMPERATURE, LAST_TEMPERATURE = 1.0, 0.05  # the paper has none, which is 1


@dataclass(frozen=True)
class SearchResult:
    """groups: V group numbers, from 0. importance: (V, G) fp32, the softmax weights they are the argmax of."""

    groups: list[int]
    importance: Tensor

    def entropy(self) -> Tensor:
        """(V,) in [0, ln G]: how undecided each timestep's group is."""
        return _entropy(self.importance)


def search_groups(
    layers: list[BucketValues],
    symmetric: list[bool],
    groups: int,
    bits: int = 8,
    iterations: int = 150,
    expected_error: bool = False,
) -> SearchResult:
    """Groups that the given layers share: one list of weights, ranges of each layer's own.

    Args:
        layers: all visited in the same V buckets; one layer for groups of its own.
        expected_error: minimise sum_g w_g |x - Q_g(x)|^2 instead of the paper's |x - sum_g w_g Q_g(x)|^2.
    """
    # ComfyUI runs nodes in inference mode, and nothing that is born there can be trained with: clones are made outside.
    with torch.inference_mode(False), torch.enable_grad():
        layers = [BucketValues(**{part: tensor.clone() for part, tensor in vars(layer).items()}) for layer in layers]
        values = torch.stack([layer.values for layer in layers])  # (L, V, S)
        energy = torch.stack([layer.energy for layer in layers])  # (L, V)
        ranges = _Ranges(layers, symmetric, groups, bits)
        logits = _first_logits(layers, values.shape[1], groups).requires_grad_()
        optimizer = torch.optim.Adam([logits, *ranges.parameters()], lr=LEARNING_RATE)
        unit: float | None = None
        for iteration in range(iterations):
            temperature = FIRST_TEMPERATURE * (LAST_TEMPERATURE / FIRST_TEMPERATURE) ** (iteration / max(1, iterations - 1))
            importance = (logits / temperature).softmax(1)  # (V, G)
            quantized = ranges.quantize(values)  # (L, V, S, G)
            error = (_error(quantized, values, importance, expected_error) / energy).mean()
            unit = unit or max(error.item(), 1e-12)
            loss = error / unit + ENTROPY_WEIGHT * _entropy(importance).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    importance = (logits.detach() / LAST_TEMPERATURE).softmax(1)
    return SearchResult(importance.argmax(1).tolist(), importance)


def _error(quantized: Tensor, values: Tensor, importance: Tensor, expected: bool) -> Tensor:
    """(L, V)"""
    if expected:
        return ((quantized - values[..., None]).square().mean(2) * importance).sum(-1)
    mixed = (quantized * importance[:, None, :]).sum(-1)  # (L, V, S)
    return (mixed - values).square().mean(2)


def _first_logits(layers: list[BucketValues], V: int, groups: int) -> Tensor:
    """Slightly in favour of the quantizer whose first range fits best: from equal weights nothing would ever tell them apart."""
    size = torch.stack([torch.maximum(-layer.low, layer.high).clamp_min(1e-6).log() for layer in layers]).mean(0)  # (V,)
    rank = size.argsort().argsort()
    favoured = (rank * groups) // V
    return 0.01 + 0.5 * torch.nn.functional.one_hot(favoured, groups).float()


class _Ranges:
    """[low, high] of each layer's G quantizers as trainable logarithms, first at evenly spaced ranks of the measured ranges."""

    def __init__(self, layers: list[BucketValues], symmetric: list[bool], groups: int, bits: int) -> None:
        low, high = zip(*(_first_ranges(layer, one, groups) for layer, one in zip(layers, symmetric, strict=True)), strict=True)
        self._log_low = torch.stack(low).log().requires_grad_()  # (L, G), of -low
        self._log_high = torch.stack(high).log().requires_grad_()
        self._symmetric = torch.tensor(symmetric)[:, None]
        self._largest = 2 ** (bits - 1) - 1

    def parameters(self) -> list[Tensor]:
        return [self._log_low, self._log_high]

    def quantize(self, x: Tensor) -> Tensor:
        """(L, V, S) -> (L, V, S, G). Rounding passes gradients through (straight-through estimator)."""
        low, high = -self._log_low.exp(), self._log_high.exp()
        levels = 2 * self._largest + 1
        scale = torch.where(self._symmetric, high / self._largest, (high - low) / levels)  # (L, G)
        zero_point = torch.where(self._symmetric, torch.zeros_like(scale), _round(-self._largest - 1 - low / scale))
        lowest = torch.where(self._symmetric, -self._largest, -self._largest - 1)
        scale, zero_point, lowest = (part[:, None, None, :] for part in (scale, zero_point, lowest.expand_as(scale)))
        codes = _round(x[..., None] / scale + zero_point)
        codes = torch.minimum(torch.maximum(codes, lowest), torch.full_like(lowest, self._largest))
        return (codes - zero_point) * scale


def _first_ranges(layer: BucketValues, symmetric: bool, groups: int) -> tuple[Tensor, Tensor]:
    """(G,) of -low and of high, both > 0."""
    low, high = (-layer.low).clamp_min(1e-6), layer.high.clamp_min(1e-6)
    if symmetric:
        low = high = torch.maximum(low, high)
    place = (torch.arange(groups) + 0.5) / groups
    return low.quantile(place), high.quantile(place)


def _round(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def _entropy(importance: Tensor) -> Tensor:
    return -(importance * importance.clamp_min(math.exp(-30)).log()).sum(1)
