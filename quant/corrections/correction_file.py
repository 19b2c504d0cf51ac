"""A file of corrections and the verdict on each: what it was fitted on, what it did on prompts it was not fitted on. Knows no engine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..atomic_file import save_tensors
from ..safe_header import damaged, open_tensors, printable
from ..timestep import NUM_BUCKETS
from .output import CHANNELS, OutputCorrection

HEADER_KEY = "stepquant_corrections"
FORMAT_VERSION = 1
KIND = "a file of StepQuant corrections"
METHODS = ("ptqd", "reconstruction", "least-squares", "input-bias")
# Less than this on held-out prompts is luck: their figures move by about as much from one set of prompts to another.
LEAST_GAIN_DB = 0.1
_TABLES = ("gain", "offset", "input_bias")


@dataclass(frozen=True)
class Verdict:
    """Held-out prompts, in dB. sqnr: of the UNet's output on the reference's trajectory; latent: of its own final latents, the median
    over prompts, since one picture that tips over moves a mean by decibels."""

    sqnr_before_db: float
    sqnr_after_db: float
    latent_before_db: float
    latent_after_db: float

    @property
    def helps(self) -> bool:
        """Whether the latents come nearer, and the estimates do not pay for it."""
        return self.latent_after_db - self.latent_before_db >= LEAST_GAIN_DB and self.sqnr_after_db >= self.sqnr_before_db - LEAST_GAIN_DB


@dataclass(frozen=True)
class Corrections:
    """By method: its tables and the verdict on them. base: identity of the model. summary: prompts, sampler, recipe."""

    tables: Mapping[str, OutputCorrection]
    verdicts: Mapping[str, Verdict]
    base: dict[str, object] = field(default_factory=dict)
    summary: dict[str, object] = field(default_factory=dict)

    def chosen(self) -> str | None:
        """The method that brings the held-out latents nearest, of those that help; None if none does."""
        helping = {name: verdict for name, verdict in self.verdicts.items() if verdict.helps}
        return max(helping, key=lambda name: helping[name].latent_after_db, default=None)

    def lines(self) -> list[str]:
        """Each verdict as a sentence."""
        return [
            f"{name}: output {one.sqnr_before_db:.2f} -> {one.sqnr_after_db:.2f} dB, latents {one.latent_before_db:.2f} -> "
            f"{one.latent_after_db:.2f} dB on held-out prompts: {'helps' if one.helps else 'does not help'}"
            for name, one in self.verdicts.items()
        ]


def save_corrections(corrections: Corrections, path: str | Path, library_version: str) -> None:
    """Write the file, whole or not at all. Raises FormatError if the folder cannot be written."""
    tensors = {f"{name}.{part}": getattr(table, part).clone() for name, table in corrections.tables.items() for part in _TABLES}
    header = {
        "version": FORMAT_VERSION,
        "library_version": library_version,
        "masks": {name: table.mask for name, table in corrections.tables.items()},
        "verdicts": {name: asdict(verdict) for name, verdict in corrections.verdicts.items()},
        "base_model": corrections.base,
        "summary": corrections.summary,
    }
    save_tensors(path, tensors, {HEADER_KEY: json.dumps(header), "format": "pt"})


def load_corrections(path: str | Path) -> Corrections:
    """Raises FormatError naming the file if it is missing, damaged, not ours or newer."""
    with open_tensors(path, HEADER_KEY, FORMAT_VERSION, KIND) as (header, file):
        masks, verdicts = header.get("masks"), header.get("verdicts")
        if not isinstance(masks, dict) or not isinstance(verdicts, dict) or set(verdicts) != set(masks) or not set(masks) <= set(METHODS):
            raise damaged(path, "its list of methods")
        if set(file.keys()) != {f"{name}.{part}" for name in masks for part in _TABLES}:
            raise damaged(path, "its tables are not those of its methods")
        tables = {name: _table(file, name, mask, path) for name, mask in masks.items()}
    base, summary = (value if isinstance(value := header.get(key), dict) else {} for key in ("base_model", "summary"))
    return Corrections(tables, {name: _verdict(verdict, path) for name, verdict in verdicts.items()}, base, summary)


def _table(file, name: str, mask: object, path: str | Path) -> OutputCorrection:
    parts = [file.get_tensor(f"{name}.{part}") for part in _TABLES]
    fits = all(part.shape == (NUM_BUCKETS, CHANNELS) and part.dtype is torch.float32 and bool(part.isfinite().all()) for part in parts)
    if not fits or type(mask) not in (int, float) or not 0 <= mask < 100:
        raise damaged(path, f"the tables of {printable(name)}")
    return OutputCorrection(*parts, float(mask))


def _verdict(data: object, path: str | Path) -> Verdict:
    fields = set(Verdict.__dataclass_fields__)
    if (
        not isinstance(data, dict)
        or set(data) != fields
        or not all(type(value) in (int, float) and math.isfinite(value) for value in data.values())
    ):
        raise damaged(path, "a verdict")
    return Verdict(**data)
