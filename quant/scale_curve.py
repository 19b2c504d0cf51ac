"""Smooth ranges over the timestep buckets, from a few numbers per layer: TDQ's idea without its network.

TDQ (arXiv 2306.02316) trains a small network s(t) per quantizer and tabulates it. Here log s(t) is a penalised B-spline
(P-spline) fitted to the measured ranges: no training, the same table at run time, and values between visited buckets.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.interpolate import BSpline
from torch import Tensor

from .timestep import NUM_BUCKETS

# Weight of the second differences of the coefficients: settles those that no visited bucket reaches, and bends no others.
SMOOTHNESS = 1e-3
# A side of the range that is this small beside the other carries no shape of its own.
SMALLEST_SIDE = 1e-3


def curve_ranges(buckets: Tensor, low: Tensor, high: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Ranges of all 64 buckets, (64,) fp32 each, that hold every measured one.

    Both sides follow a curve on a logarithmic scale, lifted as far as the measurement that sticks out most.
    Args:
        buckets: (V,) int64, visited. low, high: (V,) the extremes seen; widened to hold 0.
        points: coefficients of each curve, 1 to 64. 1 is one range for all, 2 a straight line, from 4 on cubic.
    """
    high, low = high.clamp_min(0).double(), (-low).clamp_min(0).double()
    floor = SMALLEST_SIDE * torch.maximum(high, low).clamp_min(1e-9)
    return -_lifted_curve(buckets, torch.maximum(low, floor), points), _lifted_curve(buckets, torch.maximum(high, floor), points)


def _lifted_curve(buckets: Tensor, size: Tensor, points: int) -> Tensor:
    where, log_size = buckets.double().numpy(), size.log().numpy()
    everywhere = np.arange(NUM_BUCKETS, dtype=np.float64)
    coefficients = _fit(where, log_size, points)
    fitted, curve = _design(where, points) @ coefficients, _design(everywhere, points) @ coefficients
    # Beyond the visited buckets a polynomial runs away: there the curve is held level.
    curve = np.interp(np.clip(everywhere, where[0], where[-1]), everywhere, curve)
    return torch.from_numpy(np.exp(curve + max(0.0, float((log_size - fitted).max())))).float()


def _fit(where: np.ndarray, values: np.ndarray, points: int) -> np.ndarray:
    bends = np.diff(np.eye(points), n=2, axis=0) if points > 2 else np.zeros((0, points))
    system = np.concatenate([_design(where, points), SMOOTHNESS * bends])
    return np.linalg.lstsq(system, np.concatenate([values, np.zeros(len(bends))]), rcond=None)[0]


def _design(where: np.ndarray, points: int) -> np.ndarray:
    """(len(where), points): B-splines of degree 3 or less with even knots over all buckets."""
    degree = min(3, points - 1)
    inner = np.linspace(0, NUM_BUCKETS - 1, points - degree + 1)
    knots = np.concatenate([np.full(degree, inner[0]), inner, np.full(degree, inner[-1])])
    return BSpline.design_matrix(where, knots, degree).toarray()
