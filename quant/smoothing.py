"""Smoothing: per-channel scales moved from a layer's input into its weight, where that makes less noise. Moves nothing itself.

SmoothQuant (arXiv 2211.10438, equation 4) for the modules that gain most, as the local treatment of Efficient Quantization Strategies
for Latent Diffusion Models (arXiv 2312.05431). Differs from both: the exponent is tried on recorded rows, and a module that gains less
than MIN_GAIN_DB is left alone. LoRAs of a smoothed layer see the smoothed input: fold them in before smoothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .activation_choice import MIN_GAIN_DB
from .activation_noise import simulated_rows
from .observer import LayerStatistics
from .scheme import Scheme
from .sqnr import sqnr_db
from .timestep import uniform_groups
from .weight import dequantize_weight, quantize_weight

EXPONENTS = (0.35, 0.5, 0.65, 0.8)
LEAST_ABSMAX = 1e-5


def smoothing_factor(statistics: LayerStatistics, weights: Sequence[Tensor], exponent: float) -> Tensor:
    """(K,) fp32 that the input is to be multiplied with, and the weights' columns divided by; geometric mean 1.

    1 / f[k] = max|x[k]|^a / max|w[k]|^(1 - a). Args: weights: (N, K) of all layers that read the input, any float dtype.
    """
    absmax = torch.maximum(statistics.range_min.abs(), statistics.range_max.abs()).amax(0).clamp_min(LEAST_ABSMAX)
    columns = torch.stack([weight.detach().float().cpu().abs().amax(0) for weight in weights]).amax(0).clamp_min(LEAST_ABSMAX)
    factor = columns ** (1 - exponent) / absmax**exponent
    return factor / factor.log().mean().exp()


def choose_smoothing(statistics: LayerStatistics, weights: Sequence[Tensor], exponents: Sequence[float] = EXPONENTS) -> Tensor | None:
    """The factor with the least noise of 8-bit weights and per-token inputs, or None if it gains less than MIN_GAIN_DB.

    Args: weights: (N, K) of all layers that read the input.
    """
    weights = [weight.detach().float().cpu() for weight in weights]
    best, highest = None, _mean_sqnr_db(statistics, weights) + MIN_GAIN_DB
    for exponent in exponents:
        factor = smoothing_factor(statistics, weights, exponent)
        reached = _mean_sqnr_db(smoothed_statistics(statistics, factor), [weight / factor for weight in weights])
        if reached > highest:
            best, highest = factor, reached
    return best


def smoothed_statistics(statistics: LayerStatistics, factor: Tensor) -> LayerStatistics:
    """The statistics that the layer would have with its input multiplied by the factor."""
    rows = statistics.rows.float() * factor
    absmax = rows.abs().amax(1).mean() / statistics.rows.float().abs().amax(1).mean().clamp_min(LEAST_ABSMAX)
    return LayerStatistics(
        buckets=statistics.buckets,
        count=statistics.count,
        range_min=statistics.range_min * factor,
        range_max=statistics.range_max * factor,
        token_absmax=statistics.token_absmax * absmax,
        rows=rows.to(statistics.rows.dtype),
        row_bucket=statistics.row_bucket,
    )


def _mean_sqnr_db(statistics: LayerStatistics, weights: Sequence[Tensor]) -> float:
    """Of the layers' outputs, weight and activation noise together."""
    rows = statistics.rows.float()
    noisy = simulated_rows(statistics, Scheme(), uniform_groups(1))
    total = 0.0
    for weight in weights:
        codes = quantize_weight(weight, "smoothed weight")
        total += sqnr_db(rows @ weight.t(), noisy @ dequantize_weight(codes.codes, codes.scale, torch.float32).t())
    return total / len(weights)
