"""The integer program behind a plan: one option per layer under limits, solved by scipy's HiGHS. Makes no recipe (see plan.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from ..errors import PlanError
from .layer_noise import LayerOptions, Option

# The mean of dB over steps is not linear in the noise: noise is weighed by 1 / (the step's total), which is its slope, and
# the weights are taken anew from the solution.
REWEIGHTINGS = 2
SECONDS_PER_PROGRAM = 20
RELATIVE_GAP = 1e-3  # 0.004 dB
FLOOR_SEARCHES = 10
LEAST_NOISE = 1e-30
INTEGER_SHARE = 0.98  # "full": at least so much of the multiply-adds outside the never-quantized layers runs as integers


@dataclass(frozen=True)
class Budget:
    """What a plan must keep to; None: no limit.

    size_bytes: of the UNet's file. vram_bytes: of its weights while sampling, one dequantized layer included.
    sqnr_db: floor of the predicted SQNR; the plan is then the fastest that reaches it, else the best that fits. Only to reach a floor
        are 16-bit codes used: they take twice the time, and the best plan would have nothing else.
    integer_share: of the multiply-adds, in [0, 1].
    """

    size_bytes: int | None = None
    vram_bytes: int | None = None
    sqnr_db: float | None = None
    integer_share: float = INTEGER_SHARE


class Program:
    """A 0/1 variable for each layer and option. A solution is the index of each layer's option, in order."""

    def __init__(self, layers: Sequence[LayerOptions], other_bytes: int, presolve: bool = False) -> None:
        """other_bytes: of the UNet's tensors that stay 16 bit in any plan. presolve: three times as fast, but some builds of
        HiGHS then leave a debug line on stdout, which would spoil what the command line prints for machines."""
        self.layers, self.other_bytes, self._presolve = layers, other_bytes, presolve
        self.buckets = sorted({int(bucket) for one in layers for bucket in one.buckets})
        pairs = [(one, option) for one in layers for option in one.options]
        self.noise = np.stack([self.spread(one, option) for one, option in pairs])  # (variables, buckets)
        self.size = np.array([float(option.stored_bytes) for _, option in pairs])
        self.wide_macs = np.array([one.macs * option.is_wide for one, option in pairs])
        self.integer_macs = np.array([one.macs * option.is_integer for one, option in pairs])
        self.time = np.array([one.macs * option.time_per_mac for one, option in pairs])
        self.macs = sum(one.macs for one in layers)
        self.largest_layer = max(one.dequantized_bytes for one in layers)
        offsets = np.cumsum([0, *(len(one.options) for one in layers)])
        self._first = offsets[:-1]
        owner = np.repeat(np.arange(len(layers)), np.diff(offsets))
        self._one_each = csr_matrix((np.ones(len(pairs)), (owner, np.arange(len(pairs)))))

    def spread(self, layer: LayerOptions, option: Option) -> np.ndarray:
        """Noise in every bucket; a layer that was not seen in one adds nothing there."""
        spread = np.zeros(len(self.buckets))
        spread[np.searchsorted(self.buckets, layer.buckets.numpy())] = option.noise.numpy()
        return spread

    def best(self, budget: Budget) -> list[int]:
        """The highest mean SQNR in dB that fits. Raises PlanError if nothing does."""
        chosen = [0] * len(self.layers)
        for _ in range(1 + REWEIGHTINGS):
            chosen = self._solve(self.noise @ self._weights(chosen), budget)
        return chosen

    def fastest(self, budget: Budget) -> list[int]:
        """The least time whose predicted SQNR reaches the floor: the noise allowed is searched by halving. Raises PlanError."""
        best = self.best(budget)
        if self.mean_db(best) < budget.sqnr_db:
            raise PlanError(
                f"plan: {budget.sqnr_db:.1f} dB asked, at most {self.mean_db(best):.1f} dB fits the budget. "
                "Lower the floor or the integer share, or allow more bytes."
            )
        # In units of the best plan's noise, which is 1 in every bucket.
        row, chosen = self.noise @ self._weights(best) / len(self.buckets), best
        low, high = 0.0, (self.mean_db(best) - budget.sqnr_db) / 10 + 1
        for _ in range(FLOOR_SEARCHES):
            middle = (low + high) / 2
            found = self._solve(self.time, budget, row / 10**middle)
            if self.mean_db(found) >= budget.sqnr_db:
                low, chosen = middle, found
            else:
                high = middle
        return chosen

    def noise_of(self, chosen: Sequence[int]) -> np.ndarray:
        """(buckets,)"""
        return self.noise[self._first + np.asarray(chosen)].sum(0)

    def mean_db(self, chosen: Sequence[int]) -> float:
        return float(np.mean(decibels(self.noise_of(chosen))))

    def total(self, values: np.ndarray, chosen: Sequence[int]) -> float:
        """Sum of size, integer_macs or time over a solution."""
        return float(values[self._first + np.asarray(chosen)].sum())

    def size_range(self) -> tuple[float, float]:
        """Bytes of the smallest and the largest solution, without other_bytes."""
        return float(self._each(np.minimum, self.size).sum()), float(self._each(np.maximum, self.size).sum())

    def _weights(self, chosen: Sequence[int]) -> np.ndarray:
        return 1 / np.maximum(self.noise_of(chosen), LEAST_NOISE)

    def _each(self, reduce: np.ufunc, values: np.ndarray) -> np.ndarray:
        return reduce.reduceat(values, self._first)

    def _solve(self, objective: np.ndarray, budget: Budget, noise: np.ndarray | None = None) -> list[int]:
        """noise: a row that may sum to 1 at most."""
        rules = [LinearConstraint(self._one_each, 1, 1)]
        vram = None if budget.vram_bytes is None else budget.vram_bytes - self.largest_layer
        limits = [size for size in (budget.size_bytes, vram) if size is not None]
        if limits:
            rules.append(LinearConstraint(self.size / 1e6, -np.inf, (min(limits) - self.other_bytes) / 1e6))
        rules.append(LinearConstraint(self.integer_macs / self.macs, budget.integer_share - 1e-9, np.inf))
        if noise is not None:
            rules.append(LinearConstraint(noise, -np.inf, 1 + 1e-6))
        highest = np.ones(len(objective)) if budget.sqnr_db is not None else np.where(self.wide_macs > 0, 0.0, 1.0)
        options = {"time_limit": SECONDS_PER_PROGRAM, "mip_rel_gap": RELATIVE_GAP, "presolve": self._presolve}
        unit = np.abs(objective).max() or 1.0
        result = milp(objective / unit, constraints=rules, integrality=np.ones(len(objective)), bounds=Bounds(0, highest), options=options)
        if result.x is None:
            raise self._nothing_fits(budget)
        ends = [*self._first[1:], len(objective)]
        return [int(result.x[first:end].argmax()) for first, end in zip(self._first, ends, strict=True)]

    def _nothing_fits(self, budget: Budget) -> PlanError:
        share = float(self._each(np.maximum, self.integer_macs).sum()) / self.macs
        if share < budget.integer_share - 1e-9:
            return PlanError(
                f"plan: {100 * budget.integer_share:.0f} % integer multiply-adds asked, protected layers leave {100 * share:.1f} %. "
                "Protect fewer layers, or ask for a smaller share."
            )
        smallest = self.other_bytes + self.size_range()[0]
        return PlanError(
            f"plan: the budget holds no plan; the smallest file is {math.ceil(smallest / 1e5) / 10:.1f} MB, and in memory "
            f"{math.ceil((smallest + self.largest_layer) / 1e5) / 10:.1f} MB. Allow at least that, or a smaller integer share."
        )


def decibels(noise: np.ndarray) -> np.ndarray:
    return -10 * np.log10(np.maximum(noise, LEAST_NOISE))
