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
from .scheme import Scheme
from .timestep import NUM_BUCKETS
from .weight import SMALLEST_SCALE

CALIBRATION_KEY = "stepquant_calibration"
CALIBRATION_VERSION = 1
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
    """summary: what it was gathered on (prompts, sampler, steps, cfg...), JSON values only."""

    layers: dict[str, LayerStatistics]
    summary: dict[str, object] = field(default_factory=dict)

    def tables(self, layer: str, scheme: Scheme, groups: tuple[int, ...]) -> ActivationTables:
        """Static scales of one layer, one per timestep group, expanded to the 64 buckets.

        A group that calibration never visited takes the values of the nearest one that it did.
        Raises: CalibrationError if the layer was not observed.
        """
        if layer not in self.layers:
            raise not_calibrated(layer)
        statistics = self.layers[layer]
        group_of_bucket = torch.tensor(groups)
        group_of_visit = group_of_bucket[statistics.buckets]
        scale, zero_point = torch.empty(NUM_BUCKETS), torch.empty(NUM_BUCKETS, dtype=torch.int32)
        for group in range(int(group_of_bucket.max()) + 1):
            nearest = group_of_visit[(group_of_visit - group).abs().argmin()]
            members = group_of_visit == nearest
            low = statistics.range_min[members].min().item()
            high = statistics.range_max[members].max().item()
            if not math.isfinite(low) or not math.isfinite(high):
                raise CalibrationError(
                    f"{layer}: its input was NaN or infinite during calibration. Calibrate with a model that makes sound pictures."
                )
            rows = statistics.rows[group_of_bucket[statistics.row_bucket] == nearest].float()
            chosen = _best_range(rows, low, high, scheme.symmetric)
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
            layers = {name: LayerStatistics(**statistics) for name, statistics in parts.items()}
        except TypeError:
            raise FormatError(f"{path}: the calibration is incomplete. Calibrate again.") from None
        return cls(layers, header.get("summary", {}))


def merge(first: Calibration, second: Calibration) -> Calibration:
    """Statistics of both runs together; layers seen by only one are kept. The summaries are listed under `merged`."""
    layers = dict(first.layers)
    for name, statistics in second.layers.items():
        layers[name] = _merge_layer(name, layers[name], statistics) if name in layers else statistics
    return Calibration(layers, {"merged": [first.summary, second.summary]})


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
    kept = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:ROWS_KEPT]
    return LayerStatistics(buckets, count, low, high, absmax_sum / count, rows[kept], row_bucket[kept])


def not_calibrated(layer: str) -> CalibrationError:
    """The error for a static layer that was not observed."""
    return CalibrationError(f"{layer}: not in this calibration, so it has no static scale. Calibrate this model, or use w8a8-token.")


def static_range(low: float, high: float, symmetric: bool) -> tuple[float, int]:
    """Scale and zero point that map [low, high] onto int8; the range is widened to hold 0."""
    if symmetric:
        return max(abs(low), abs(high), SMALLEST_SCALE) / 127, 0
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, SMALLEST_SCALE) / 255
    return scale, max(-128, min(127, round(-128 - low / scale)))


def _best_range(rows: Tensor, low: float, high: float, symmetric: bool) -> tuple[float, int]:
    """Of the candidate ranges, the one with the least squared error on the recorded rows; the full one without rows."""
    best, best_error = static_range(low, high, symmetric), torch.inf
    if not rows.numel():
        return best
    for share in CLIP_CANDIDATES:
        scale, zero_point = static_range(low * share, high * share, symmetric)
        codes = (rows / scale + zero_point).round().clamp(-127 if symmetric else -128, 127)
        error = ((codes - zero_point) * scale - rows).square().sum().item()
        if error < best_error:
            best, best_error = (scale, zero_point), error
    return best


def describe(calibration: Calibration) -> Mapping[str, object]:
    """What goes into a quantized file's header: the summary and how much was observed."""
    visited = {int(bucket) for statistics in calibration.layers.values() for bucket in statistics.buckets}
    return {**calibration.summary, "layers": len(calibration.layers), "buckets": sorted(visited)}
