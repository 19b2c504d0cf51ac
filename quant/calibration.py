"""A calibration: every layer's statistics and what they were gathered on. Turns them into activation tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CalibrationError, FormatError
from .atomic_file import save_tensors
from .observer import ROWS_KEPT, LayerStatistics
from .safe_header import open_tensors
from .scale_curve import curve_ranges
from .scheme import Scheme
from .sensitivity import LayerSensitivity, merge_sensitivity
from .timestep import NUM_BUCKETS, ScaleCurve
from .weight import SMALLEST_SCALE

CALIBRATION_KEY = "stepquant_calibration"
CALIBRATION_VERSION = 1
SENSITIVITY_PREFIX = "sensitivity of "
# A little clipping loses less than none; more of it, judged on a few recorded rows, lost 2.6 dB on prompts that were
# not calibrated on (demo model: 36.0 dB down to half the range, 38.6 dB down to nine tenths).
CLIP_CANDIDATES = (1.0, 0.95, 0.9)


@dataclass(frozen=True)
class ActivationTables:
    """scale: (64,) fp32 per timestep bucket. zero_point: (64,) int32, the code of 0; None if symmetric."""

    scale: Tensor
    zero_point: Tensor | None


@dataclass
class Calibration:
    """summary: what it was gathered on (prompts, sampler, steps, cfg...), JSON values only.

    sensitivity: of the layers that were probed; a plan needs it, scales do not.
    """

    layers: dict[str, LayerStatistics]
    summary: dict[str, object] = field(default_factory=dict)
    sensitivity: dict[str, LayerSensitivity] = field(default_factory=dict)

    def tables(
        self, layer: str, scheme: Scheme, groups: tuple[int, ...] | ScaleCurve, bits: int = 8, importance: Tensor | None = None
    ) -> ActivationTables:
        """Static scales of one layer, one per timestep group, expanded to the 64 buckets.

        A group that calibration never visited takes the values of the nearest one that it did.
        Args:
            bits: of the codes; fewer than 8 only in simulations.
            importance: (C,) fp32, what a squared error of each channel counts; None for the same everywhere.
        Raises: CalibrationError if the layer was not observed.
        """
        if layer not in self.layers:
            raise not_calibrated(layer)
        statistics = self.layers[layer]
        if isinstance(groups, ScaleCurve):
            return _curve_tables(layer, statistics, scheme.symmetric, groups.points, bits, importance)
        group_of_bucket = torch.tensor(groups)
        group_of_visit = group_of_bucket[statistics.buckets]
        scale, zero_point = torch.empty(NUM_BUCKETS), torch.empty(NUM_BUCKETS, dtype=torch.int32)
        for group in range(int(group_of_bucket.max()) + 1):
            nearest = group_of_visit[(group_of_visit - group).abs().argmin()]
            members = group_of_visit == nearest
            low = statistics.range_min[members].min().item()
            high = statistics.range_max[members].max().item()
            _check_finite(layer, low, high)
            rows = statistics.rows[group_of_bucket[statistics.row_bucket] == nearest].float()
            chosen = _best_range(rows, low, high, scheme.symmetric, bits, importance)
            scale[group_of_bucket == group], zero_point[group_of_bucket == group] = chosen
        return ActivationTables(scale, None if scheme.symmetric else zero_point)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: to a temporary name first, then renamed.

        Raises: FormatError if it cannot be written.
        """
        tensors = {
            f"{name}|{part.name}": getattr(statistics, part.name).contiguous()
            for name, statistics in self.layers.items()
            for part in fields(LayerStatistics)
        }
        for name, sensitivity in self.sensitivity.items():
            tensors |= {f"{SENSITIVITY_PREFIX}{name}|{part.name}": getattr(sensitivity, part.name) for part in fields(LayerSensitivity)}
        header = {"version": CALIBRATION_VERSION, "summary": self.summary}
        save_tensors(path, tensors, {CALIBRATION_KEY: json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Raises FormatError if the file is missing, damaged, of another kind or of a newer version."""
        with open_tensors(path, CALIBRATION_KEY, CALIBRATION_VERSION, "a StepQuant calibration") as (header, file):
            parts: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 - safetensors' handle is no dict
                name, _, part = key.rpartition("|")
                parts.setdefault(name, {})[part] = file.get_tensor(key)
        try:
            probed = {name: parts.pop(name) for name in list(parts) if name.startswith(SENSITIVITY_PREFIX)}
            layers = {name: LayerStatistics(**statistics) for name, statistics in parts.items()}
            sensitivity = {name.removeprefix(SENSITIVITY_PREFIX): LayerSensitivity(**tensors) for name, tensors in probed.items()}
        except TypeError:
            raise FormatError(f"{path}: the calibration is incomplete. Calibrate again.") from None
        return cls(layers, header.get("summary", {}), sensitivity)


def merge(first: Calibration, second: Calibration) -> Calibration:
    """Statistics of both runs together; layers seen by only one are kept. The summaries are listed under `merged`."""
    layers = dict(first.layers)
    for name, statistics in second.layers.items():
        layers[name] = _merge_layer(name, layers[name], statistics) if name in layers else statistics
    sensitivity = dict(first.sensitivity)
    for name, probed in second.sensitivity.items():
        sensitivity[name] = merge_sensitivity(sensitivity[name], probed) if name in sensitivity else probed
    return Calibration(layers, {"merged": [first.summary, second.summary]}, sensitivity)


def _merge_layer(name: str, first: LayerStatistics, second: LayerStatistics) -> LayerStatistics:
    if first.range_min.shape[1] != second.range_min.shape[1]:
        raise CalibrationError(
            f"{name}: {first.range_min.shape[1]} input channels in one calibration, {second.range_min.shape[1]} in the "
            "other. They are of different models; calibrate both on the same one."
        )
    buckets = torch.unique(torch.cat([first.buckets, second.buckets]))
    shape = (len(buckets), first.range_min.shape[1])
    low, high = torch.full(shape, torch.inf), torch.full(shape, -torch.inf)
    count, absmax_sum = torch.zeros(len(buckets), dtype=torch.long), torch.zeros(len(buckets))
    for part in (first, second):
        slot = torch.searchsorted(buckets, part.buckets)
        low[slot] = torch.minimum(low[slot], part.range_min)
        high[slot] = torch.maximum(high[slot], part.range_max)
        count[slot] += part.count
        absmax_sum[slot] += part.token_absmax * part.count
    rows, row_bucket = torch.cat([first.rows, second.rows]), torch.cat([first.row_bucket, second.row_bucket])
    # A kept row stands for all rows that its run saw per kept one. The largest of u^(1 / weight) are a sample in proportion
    # to the weights (Efraimidis and Spirakis, 2006), so that the longer run has the larger part.
    weight = torch.cat([torch.full((len(part.rows),), float(part.count.sum()) / max(1, len(part.rows))) for part in (first, second)])
    keys = torch.rand(len(rows), generator=torch.Generator().manual_seed(0), dtype=torch.float64).log() / weight
    kept = keys.topk(min(ROWS_KEPT, len(rows))).indices
    return LayerStatistics(buckets, count, low, high, absmax_sum / count, rows[kept], row_bucket[kept])


def not_calibrated(layer: str) -> CalibrationError:
    """The error for a static layer that was not observed."""
    return CalibrationError(f"{layer}: not in this calibration, so it has no static scale. Calibrate this model, or use w8a8-token.")


def _check_finite(layer: str, low: float, high: float) -> None:
    if not math.isfinite(low) or not math.isfinite(high):
        raise CalibrationError(
            f"{layer}: its input was NaN or infinite during calibration. Calibrate with a model that makes sound pictures."
        )


def _curve_tables(
    layer: str, statistics: LayerStatistics, symmetric: bool, points: int, bits: int, importance: Tensor | None
) -> ActivationTables:
    low, high = statistics.range_min.amin(1), statistics.range_max.amax(1)  # (V,)
    _check_finite(layer, low.min().item(), high.max().item())
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    low, high = curve_ranges(statistics.buckets, low, high, points)
    rows, best, least = statistics.rows.float(), None, torch.inf
    for share in CLIP_CANDIDATES:
        pairs = [static_range(float(a) * share, float(b) * share, symmetric, bits) for a, b in zip(low, high, strict=True)]
        scale, zero_point = torch.tensor([pair[0] for pair in pairs]), torch.tensor([pair[1] for pair in pairs], dtype=torch.int32)
        row_scale, row_zero = scale[statistics.row_bucket][:, None], zero_point[statistics.row_bucket][:, None]
        error = _squared_error(rows, row_scale, row_zero, symmetric, bits, importance)
        if best is None or error < least:
            best, least = ActivationTables(scale, None if symmetric else zero_point), error
    return best


def static_range(low: float, high: float, symmetric: bool, bits: int = 8) -> tuple[float, int]:
    """Scale and zero point that map [low, high] onto signed codes of so many bits; the range is widened to hold 0."""
    largest = 2 ** (bits - 1) - 1
    if symmetric:
        return max(abs(low), abs(high), SMALLEST_SCALE) / largest, 0
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, SMALLEST_SCALE) / (2 * largest + 1)
    return scale, max(-largest - 1, min(largest, round(-largest - 1 - low / scale)))


def _best_range(rows: Tensor, low: float, high: float, symmetric: bool, bits: int, importance: Tensor | None) -> tuple[float, int]:
    """Of the candidate ranges, the one with the least squared error on the recorded rows; the full one without rows."""
    best, best_error = static_range(low, high, symmetric, bits), torch.inf
    if not rows.numel():
        return best
    for share in CLIP_CANDIDATES:
        scale, zero_point = static_range(low * share, high * share, symmetric, bits)
        error = _squared_error(rows, scale, zero_point, symmetric, bits, importance)
        if error < best_error:
            best, best_error = (scale, zero_point), error
    return best


def quantized_values(x: Tensor, scale: float | Tensor, zero_point: int | Tensor, symmetric: bool, bits: int = 8) -> Tensor:
    """x rounded to the codes of a static scale and back, fp32; scale and zero_point broadcast against x."""
    largest = 2 ** (bits - 1) - 1
    codes = (x / scale + zero_point).round().clamp(-largest if symmetric else -largest - 1, largest)
    return (codes - zero_point) * scale


def _squared_error(
    rows: Tensor, scale: float | Tensor, zero_point: int | Tensor, symmetric: bool, bits: int, importance: Tensor | None
) -> float:
    squared = (quantized_values(rows, scale, zero_point, symmetric, bits) - rows).square()
    return (squared if importance is None else squared * importance).sum().item()


def describe(calibration: Calibration) -> Mapping[str, object]:
    """What goes into a quantized file's header: the summary and how much was observed."""
    visited = {int(bucket) for statistics in calibration.layers.values() for bucket in statistics.buckets}
    counts = {"layers": len(calibration.layers), "probed_layers": len(calibration.sensitivity)}
    return {**calibration.summary, **counts, "buckets": sorted(visited)}
