"""Which steps of a sampling run calibration looks at: all, those that ADP-DM's rule picks, or the noisiest alone. Samples nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import Enum

from .group_search import search_groups
from .layers import needs_row_scales
from .observer import LayerStatistics
from .range_error import bucket_values

# eta in ADP-DM (arXiv 2305.18723): the weight of timesteps that were seldom looked at.
RARITY_WEIGHT = 1.5
SEARCH_GROUPS = 8
# The assignment of a few layers tells how undecided a timestep is; all of them would take longer than sampling.
LAYERS_ASKED = 8
VALUES_ASKED = 32
# Share of a run's steps that the rule picks after the first run, which is looked at whole.
PICKED_SHARE = 0.25


class CalibrationMode(str, Enum):
    FULL = "full"  # every step of every run
    SRM = "srm"  # ADP-DM's choice: the undecided and the rarely seen
    PROGRESSIVE = "progressive"  # every step, each on what the quantized steps before it made (progressive.py): two UNet calls a step
    NOISIEST = "noisiest"  # the first step alone (Efficient Quantization Strategies for LDMs, arXiv 2312.05431): by far the fastest


class StepChoice:
    """Tells run after run which buckets to observe, and how far the run has to go for that."""

    def __init__(self, mode: CalibrationMode | str) -> None:
        self._mode = CalibrationMode(mode)
        self._used: Counter[int] = Counter()
        self._buckets_by_step: list[int] = []
        self._picked: frozenset[int] | None = None

    @property
    def whole_runs(self) -> bool:
        """Whether every run goes to its last step and all of it is observed."""
        return self._mode in (CalibrationMode.FULL, CalibrationMode.PROGRESSIVE)

    def begin_run(self, statistics: Mapping[str, LayerStatistics]) -> int | None:
        """Choose for the next run from what was recorded so far.

        Returns: after how many steps the run may stop; None if it goes to the end.
        """
        if self._mode is CalibrationMode.NOISIEST:
            return 1
        if self.whole_runs or not self._buckets_by_step:
            return None
        count = max(1, round(PICKED_SHARE * len(self._buckets_by_step)))
        self._picked = frozenset(choose_timesteps(timestep_entropy(statistics), self._used, count))
        self._used.update(self._picked)
        return 1 + max(step for step, bucket in enumerate(self._buckets_by_step) if bucket in self._picked)

    def observes(self, bucket: int) -> bool:
        """Whether a sample in this bucket is recorded in the present run."""
        return self._picked is None or bucket in self._picked

    def end_run(self, buckets_by_step: list[int]) -> None:
        """Learn the schedule from the first run: the bucket of each of its steps."""
        if not self._buckets_by_step:
            self._buckets_by_step = buckets_by_step
            self._used.update(set(buckets_by_step))


def choose_timesteps(entropy: Mapping[int, float], used: Mapping[int, int], count: int) -> list[int]:
    """The buckets with the highest score, entropy_t + eta / (N_t + 1).

    The entropy stands for the empirical risk (a timestep whose group is undecided), the second term for the distance between
    the calibrated and the real distribution; together they bound the structural risk.
    Args:
        entropy: by bucket, of the group weights. used: how often each bucket was looked at.
    Source: ADP-DM (arXiv 2305.18723), timestep selection by structural risk minimisation. The released code subtracts 2 N_t instead.
    """
    score = {bucket: value + RARITY_WEIGHT / (used.get(bucket, 0) + 1) for bucket, value in entropy.items()}
    return sorted(score, key=lambda bucket: (-score[bucket], -bucket))[:count]


def timestep_entropy(statistics: Mapping[str, LayerStatistics]) -> dict[int, float]:
    """How undecided the group of every visited bucket is: entropy of ADP-DM's group weights, searched on a few layers."""
    usable = [name for name, layer in statistics.items() if not needs_row_scales(name) and len(layer.rows)]
    visits = [tuple(statistics[name].buckets.tolist()) for name in usable]
    usual = max(set(visits), key=visits.count)
    usable = [name for name, visit in zip(usable, visits, strict=True) if visit == usual]
    asked = usable[:: max(1, len(usable) // LAYERS_ASKED)][:LAYERS_ASKED]
    values = [bucket_values(statistics[name], VALUES_ASKED) for name in asked]
    result = search_groups(values, [True] * len(values), min(SEARCH_GROUPS, len(usual)))
    return dict(zip(usual, result.entropy().tolist(), strict=True))
