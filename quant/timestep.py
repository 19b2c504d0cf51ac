"""Timestep buckets and groups on SDXL's base schedule. The sampler's own units never reach the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SchemeError

NUM_TIMESTEPS = 1000
NUM_BUCKETS = 64

# SDXL base 1.0, scheduler_config.json: scaled-linear betas.
BETA_START, BETA_END = 0.00085, 0.012


def timestep_bucket(timestep: Tensor) -> Tensor:
    """Bucket of each timestep.

    Args:
        timestep: (B,) in [0, 1000), any float or integer dtype; values outside are clamped.
    Returns: (B,) int64 in [0, 64).
    """
    return (timestep.float() * (NUM_BUCKETS / NUM_TIMESTEPS)).floor().clamp(0, NUM_BUCKETS - 1).long()


def uniform_groups(groups: int) -> tuple[int, ...]:
    """Timestep group of each of the 64 buckets, in `groups` equal runs.

    Raises: SchemeError if `groups` is not in 1..64.
    """
    if not 1 <= groups <= NUM_BUCKETS:
        raise SchemeError(f"timestep groups: {groups}; 1 to {NUM_BUCKETS} are possible. Usual is 8.")
    return tuple(bucket * groups // NUM_BUCKETS for bucket in range(NUM_BUCKETS))


@dataclass(frozen=True)
class ScaleCurve:
    """Takes the place of timestep groups: scales on a smooth curve over the buckets, fitted with `points` numbers a layer."""

    points: int


def spread_groups(visited: Sequence[int], group_of_visit: Sequence[int]) -> tuple[int, ...]:
    """Timestep group of each of the 64 buckets, from those of the visited ones: an unvisited bucket joins the nearest, the lower of two.

    Groups are numbered anew from 0 in the order of the buckets. `visited` ascends and holds one bucket at least.
    """
    positions = torch.tensor(list(visited))
    nearest = (positions[None] - torch.arange(NUM_BUCKETS)[:, None]).abs().argmin(1).tolist()
    number: dict[int, int] = {}
    return tuple(number.setdefault(group_of_visit[visit], len(number)) for visit in nearest)


def base_log_sigmas() -> Tensor:
    """(1000,) float64: log sigma of each timestep of SDXL's base schedule, ascending."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1.0 - betas, 0)
    return (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).log()


def sigma_to_timestep(sigma: Tensor) -> Tensor:
    """Position of a noise level on SDXL's base schedule, linear in log sigma between timesteps.

    Args:
        sigma: (B,) > 0, as in x = x0 + sigma * noise; beyond the schedule's ends it is clamped.
    Returns: (B,) float32 in [0, 999].
    """
    table = base_log_sigmas().to(sigma.device)
    log_sigma = sigma.double().clamp_min(1e-10).log().clamp(table[0], table[-1])
    upper = torch.searchsorted(table, log_sigma).clamp(1, NUM_TIMESTEPS - 1)
    low, high = table[upper - 1], table[upper]
    return (upper - 1 + (log_sigma - low) / (high - low)).float()
