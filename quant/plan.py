"""Mixed precision: one scheme per layer under a budget, what it is predicted to do, and the recipe of it.

Global treatment and SQNR as the measure: Efficient Quantization Strategies for Latent Diffusion Models (arXiv 2312.05431).
Integer program over layers: MixDQ (arXiv 2405.17873), which weighs layers by SQNR or SSIM of the picture with one layer
quantized at a time; here each layer's noise is carried to the UNet's output by its measured gain, and noises add up.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..errors import CalibrationError, PlanError
from .calibration import Calibration, not_calibrated
from .grouping import Grouping, GroupingMethod
from .layer_noise import FP16, LayerOptions, candidate_schemes, layer_options
from .layers import LayerSpec
from .plan_program import INTEGER_SHARE, Budget, Program, decibels
from .recipe import Recipe
from .rounding.method import Rounding
from .scheme import Scheme

FRONTIER_SHARES, FRONTIER_SIZES = (1.0, INTEGER_SHARE, 0.9, 0.5), 4


@dataclass(frozen=True)
class FrontierPoint:
    """The best plan of a size that runs integer_share of the multiply-adds as integers, at least."""

    integer_share: float
    size_bytes: int
    sqnr_db: float


@dataclass(frozen=True)
class Plan:
    """choices: option label by layer. buckets: visited ones. sqnr_db: predicted for the UNet's output, one per bucket.

    local_sqnr_db: of each layer's own output, mean of dB over buckets; inf if it stays 16 bit. noise_share: of each layer in
    the noise of the UNet's output, in [0, 1]. vram_bytes: of the weights, one dequantized layer included.
    wide_share: of the multiply-adds, in [0, 1], those of 16-bit codes: integers as the others, but done twice.
    """

    recipe: Recipe
    choices: Mapping[str, str]
    buckets: tuple[int, ...]
    sqnr_db: tuple[float, ...]
    local_sqnr_db: Mapping[str, float]
    noise_share: Mapping[str, float]
    size_bytes: int
    vram_bytes: int
    integer_share: float
    frontier: tuple[FrontierPoint, ...] = ()
    wide_share: float = 0.0

    @property
    def mean_db(self) -> float:
        return sum(self.sqnr_db) / len(self.sqnr_db)

    @property
    def kept_16_bit(self) -> list[str]:
        """Quantizable layers that the plan leaves unquantized."""
        return [name for name, label in self.choices.items() if label == FP16]

    def lines(self) -> list[str]:
        """What was chosen and what it is predicted to do, as text."""
        counts = {label: list(self.choices.values()).count(label) for label in dict.fromkeys(self.choices.values())}
        worst_db, worst_bucket = min(zip(self.sqnr_db, self.buckets, strict=True))
        noisiest = sorted(self.noise_share, key=self.noise_share.get, reverse=True)[:3]
        twice = f"; {100 * self.wide_share:.1f} % with 16-bit codes, which take two products" if self.wide_share else ""
        return [
            "layers: " + ", ".join(f"{count} {label}" for label, count in sorted(counts.items(), key=lambda entry: -entry[1])),
            f"predicted SQNR of the UNet's output: {self.mean_db:.1f} dB, worst {worst_db:.1f} dB in bucket {worst_bucket}",
            f"integer multiply-adds: {100 * self.integer_share:.1f} % of those outside the never-quantized layers{twice}",
            f"UNet file {self.size_bytes / 1e6:.1f} MB; weights in memory {self.vram_bytes / 1e6:.1f} MB with one dequantized layer",
            f"stays 16 bit: {', '.join(self.kept_16_bit) or 'no quantizable layer'}",
            "most of the noise: " + ", ".join(f"{name} {100 * self.noise_share[name]:.0f} %" for name in noisiest),
        ]


def measure_options(
    layers: Mapping[str, LayerSpec],
    weight_of: Callable[[str], Tensor],
    calibration: Calibration,
    grouping: Grouping,
    protected: Sequence[str] = (),
    channel_groups: int = 1,
    granularity: int = 64,
    progress: Callable[[int, int], None] | None = None,
    rounding: Rounding | None = None,
    moments: Callable[[str], Tensor | None] | None = None,
    ranks: Sequence[int] = (),
) -> list[LayerOptions]:
    """Noise and bytes of every scheme of every layer.

    Args:
        weight_of: a layer's float weight by name; asked for once a layer, one at a time.
        protected: names or patterns (`*.ff.net.2`) of layers that stay 16 bit.
        channel_groups, granularity: as layer_noise.candidate_schemes takes them.
        progress: called with (layers done, layers in all).
        rounding: offers 4-bit weights too, rounded so; None: 8 bits only. moments: layer -> what its int8 weights will be rounded by.
        ranks: of low-rank branches that 4-bit weights may have.
    Raises: CalibrationError if a layer was not observed or not probed; PlanError if a pattern fits no layer.
    """
    _check_patterns(layers, protected)
    recipe = _recipe(dict.fromkeys(layers, None), grouping)
    measured = []
    for done, (name, spec) in enumerate(layers.items(), 1):
        if name not in calibration.layers:
            raise not_calibrated(name)
        if name not in calibration.sensitivity:
            raise CalibrationError(f"{name}: its sensitivity was not measured, and a plan needs it. Calibrate again with sensitivity on.")
        kept = any(fnmatch.fnmatchcase(name, pattern) for pattern in protected)
        schemes = {FP16: None} if kept else candidate_schemes(spec, channel_groups, granularity, rounding is not None, ranks)
        statistics, sensitivity = calibration.layers[name], calibration.sensitivity[name]
        rounded = (rounding, None if moments is None else moments(name))
        measured.append(layer_options(spec, weight_of(name), statistics, sensitivity, recipe.groups_of(name), schemes, *rounded))
        if progress is not None:
            progress(done, len(layers))
    return measured


def make_plan(layers: Sequence[LayerOptions], budget: Budget, grouping: Grouping, other_bytes: int, with_frontier: bool = False) -> Plan:
    """One scheme per layer.

    Args:
        other_bytes: of the UNet's tensors that stay 16 bit in any plan, biases included.
        with_frontier: also the best plans of other sizes, for a plot. Not where stdout is read (see Program).
    Raises: PlanError if nothing fits the budget, saying what would.
    """
    program = Program(layers, other_bytes)
    chosen = program.best(budget) if budget.sqnr_db is None else program.fastest(budget)
    plan = _to_plan(program, chosen, grouping)
    return replace(plan, frontier=tuple(_frontier(Program(layers, other_bytes, presolve=True)))) if with_frontier else plan


def uniform_plan(layers: Sequence[LayerOptions], label: str, grouping: Grouping, other_bytes: int) -> Plan:
    """The plan that gives every layer the option `label`, and its first one where it has none such: what a preset is predicted to do."""
    chosen = [next((i for i, option in enumerate(one.options) if option.label == label), 0) for one in layers]
    return _to_plan(Program(layers, other_bytes), chosen, grouping)


def unquantized_bytes(shapes: Mapping[str, Sequence[int]], layers: Mapping[str, LayerSpec]) -> int:
    """Bytes of the UNet's tensors that no plan touches, 16 bit each. shapes: of all its tensors by name."""
    touched = {f"{name}.weight" for name in layers}
    return sum(2 * math.prod(shape) for key, shape in shapes.items() if key not in touched)


def _check_patterns(layers: Mapping[str, LayerSpec], protected: Sequence[str]) -> None:
    for pattern in protected:
        if not fnmatch.filter(layers, pattern):
            raise PlanError(
                f"protected layer {pattern!r}: no layer of this model has such a name. Give names as `inspect --layers` lists them; "
                "* stands for any part."
            )


def _to_plan(program: Program, chosen: Sequence[int], grouping: Grouping) -> Plan:
    options = {one.name: one.options[index] for one, index in zip(program.layers, chosen, strict=True)}
    noise = program.noise_of(chosen)
    share_of = {one.name: program.spread(one, options[one.name]) / np.maximum(noise, 1e-30) for one in program.layers}
    schemes = {name: option.scheme for name, option in options.items() if option.scheme is not None}
    size = program.other_bytes + int(program.total(program.size, chosen))
    return Plan(
        recipe=_recipe(schemes, grouping),
        choices={name: option.label for name, option in options.items()},
        buckets=tuple(program.buckets),
        sqnr_db=tuple(decibels(noise).tolist()),
        local_sqnr_db={name: _mean_db(option.local_noise) for name, option in options.items()},
        noise_share={name: float(share.mean()) for name, share in share_of.items()},
        size_bytes=size,
        vram_bytes=size + program.largest_layer,
        integer_share=program.total(program.integer_macs, chosen) / program.macs,
        wide_share=program.total(program.wide_macs, chosen) / program.macs,
    )


def _mean_db(noise: Tensor) -> float:
    return float(decibels(noise.numpy()).mean()) if bool((noise > 0).any()) else math.inf


def _recipe(schemes: Mapping[str, Scheme | None], grouping: Grouping) -> Recipe:
    """Layers that follow no timestep keep no groups."""
    own = {name: grouping.layer_groups[name] for name in schemes if name in grouping.layer_groups}
    own = {name: groups for name, groups in own.items() if schemes[name] is None or schemes[name].is_static}
    points = grouping.count if grouping.method is GroupingMethod.CURVE else 0
    return Recipe(dict(schemes), "plan", "integer program over measured SQNR", grouping.groups, own, grouping.method.value, points)


def _frontier(program: Program) -> list[FrontierPoint]:
    points = []
    for share in FRONTIER_SHARES:
        for size in np.linspace(*program.size_range(), FRONTIER_SIZES):
            try:
                chosen = program.best(Budget(size_bytes=program.other_bytes + math.ceil(size), integer_share=share))
            except PlanError:
                continue  # so many integer products do not fit so few bytes, or protected layers stand against it
            points.append(FrontierPoint(share, program.other_bytes + int(program.total(program.size, chosen)), program.mean_db(chosen)))
    return points
