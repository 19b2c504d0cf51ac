"""Chooses the timestep groups of a recipe's static layers: uniform, optimal, search or curve. Runs no layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch

from ..errors import CalibrationError, SchemeError
from .calibration import Calibration, not_calibrated
from .group_search import search_groups
from .optimal_groups import optimal_segments
from .range_error import bucket_values, segment_errors
from .scheme import Scheme
from .timestep import NUM_BUCKETS, spread_groups, uniform_groups

# Values per bucket and layer that a search trains on, alone and over all layers: it takes 150 passes over them.
SEARCH_VALUES, SHARED_SEARCH_VALUES = 128, 32
Progress = Callable[[int, int], None]


class GroupingMethod(str, Enum):
    UNIFORM = "uniform"  # equal runs of the schedule; needs no statistics
    OPTIMAL = "optimal"  # the runs with the least predicted error (optimal_groups.py)
    SEARCH = "search"  # ADP-DM's differentiable search (group_search.py)
    CURVE = "curve"  # no groups: smooth scales over t (scale_curve.py)


@dataclass(frozen=True)
class Grouping:
    """count: groups asked for; of curve, its coefficients. groups: of every layer that has none of its own in layer_groups."""

    method: GroupingMethod
    count: int
    groups: tuple[int, ...]
    layer_groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def choose_groups(
    method: str,
    count: int,
    calibration: Calibration | None = None,
    schemes: Mapping[str, Scheme] | None = None,
    shared: bool = False,
    bits: int = 8,
    progress: Progress | None = None,
) -> Grouping:
    """Timestep groups by one of the four methods.

    Args:
        count: groups per layer, or coefficients of a curve; 1 to 64.
        calibration, schemes: of the layers to be grouped; uniform and curve need neither.
        shared: one division of the schedule for all layers instead of one each. optimal and search only.
        bits: of the activation codes; fewer than 8 only in simulations.
        progress: called with (layers done, layers in all).
    Raises: SchemeError if the method or count is unknown; CalibrationError if a layer was not observed.
    """
    try:
        method = GroupingMethod(method)
    except ValueError:
        known = ", ".join(one.value for one in GroupingMethod)
        raise SchemeError(f"timestep grouping {method!r}: unknown; choose one of {known}.") from None
    even = uniform_groups(count)
    if method is GroupingMethod.UNIFORM:
        return Grouping(method, count, even)
    if method is GroupingMethod.CURVE:
        return Grouping(method, count, tuple(range(NUM_BUCKETS)))
    if calibration is None or schemes is None:
        raise CalibrationError(
            f"timestep grouping {method.value}: no calibration; it divides the schedule by one. Calibrate, or use uniform."
        )
    static = {name: scheme for name, scheme in schemes.items() if scheme.is_static}
    for name in static:
        if name not in calibration.layers:
            raise not_calibrated(name)
    if shared:
        return Grouping(method, count, _shared_groups(method, count, calibration, static, bits, progress))
    own = {}
    for done, (name, scheme) in enumerate(static.items(), 1):
        own[name] = _groups_of_layer(method, count, calibration, name, scheme, bits)
        if progress is not None:
            progress(done, len(static))
    return Grouping(method, count, even, own)


def _groups_of_layer(method: GroupingMethod, count: int, calibration: Calibration, name: str, scheme: Scheme, bits: int) -> tuple[int, ...]:
    if method is GroupingMethod.OPTIMAL:
        values = bucket_values(calibration.layers[name])
        found = optimal_segments(segment_errors(values, scheme.symmetric, bits), count)
    else:
        values = bucket_values(calibration.layers[name], SEARCH_VALUES)
        found = search_groups([values], [scheme.symmetric], count, bits).groups
    return spread_groups(values.buckets.tolist(), found)


def _shared_groups(
    method: GroupingMethod, count: int, calibration: Calibration, static: Mapping[str, Scheme], bits: int, progress: Progress | None
) -> tuple[int, ...]:
    """Layers that were visited in other buckets than most (a merge of unlike runs) have no say."""
    if not static:
        return uniform_groups(count)
    visits = [tuple(calibration.layers[name].buckets.tolist()) for name in static]
    usual = max(set(visits), key=visits.count)
    counted = [name for name, visit in zip(static, visits, strict=True) if visit == usual]
    if method is GroupingMethod.SEARCH:
        values = [bucket_values(calibration.layers[name], SHARED_SEARCH_VALUES) for name in counted]
        found = search_groups(values, [static[name].symmetric for name in counted], count, bits).groups
        return spread_groups(usual, found)
    total = torch.zeros(len(usual), len(usual), dtype=torch.float64)
    for done, name in enumerate(counted, 1):
        total += segment_errors(bucket_values(calibration.layers[name]), static[name].symmetric, bits)
        if progress is not None:
            progress(done, len(counted))
    return spread_groups(usual, optimal_segments(total, count))
