"""Rounded 4-bit weights of one model on disk, one file for each block, so that a killed run goes on. Rounds nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from ...errors import CalibrationError, FormatError
from ..atomic_file import save_tensors
from ..int4 import CODE_MAX, CODE_MIN, GROUP_SIZE, MAX_GROUP_SCALE, Int4Weight
from ..low_rank import LowRank
from ..safe_header import open_tensors

ROUNDED_KEY = "stepquant_rounded"
ROUNDED_VERSION, BRANCHES_VERSION = 2, 2  # files without branches are still written as 1, for older versions
_KIND = "rounded weights of StepQuant"
_PARTS = ("codes", "group_scale", "scale")
_BRANCH_PARTS = ("branch_down", "branch_up")


@dataclass(frozen=True)
class RoundedFolder:
    """The blocks of one model. summary: what they were rounded on, JSON values only; None to accept any."""

    folder: Path
    summary: Mapping[str, object] | None = None

    def has(self, block: str) -> bool:
        """Whether the block's file is there; raises if it is of other settings, so that a resumed run mixes none."""
        path = self._path(block)
        if not path.is_file():
            return False
        with open_tensors(path, ROUNDED_KEY, ROUNDED_VERSION, _KIND) as (header, _):
            found = header.get("summary")
        if self.summary is not None and found != dict(self.summary):
            raise CalibrationError(f"{path}: rounded with other settings ({found}). Use the same ones, or another folder.")
        return True

    def write(self, block: str, weights: Mapping[str, Int4Weight]) -> None:
        """weights: by layer name. Raises: FormatError if they cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        branches = {name: weight.branch for name, weight in weights.items() if weight.branch is not None}
        header = {"version": BRANCHES_VERSION if branches else 1, "summary": dict(self.summary or {})}
        tensors = {f"{name}.{part}": getattr(weight, part).cpu().contiguous() for name, weight in weights.items() for part in _PARTS}
        for name, branch in branches.items():
            tensors |= {f"{name}.branch_down": branch.down.cpu(), f"{name}.branch_up": branch.up.cpu()}
        save_tensors(self._path(block), tensors, {ROUNDED_KEY: json.dumps(header)})
        vars(self).pop("_file_of", None)  # what was read of the folder before

    def find(self, layer: str, shape: tuple[int, ...]) -> Int4Weight | None:
        """A layer's rounded weight on the CPU; None if no block here has it.

        Raises: FormatError if its file is damaged or of another model.
        """
        path = self._file_of.get(layer)
        if path is None:
            return None
        with open_tensors(path, ROUNDED_KEY, ROUNDED_VERSION, _KIND) as (_, file):
            weight = Int4Weight(*(file.get_tensor(f"{layer}.{part}") for part in _PARTS))
            if f"{layer}.{_BRANCH_PARTS[0]}" in file.keys():  # noqa: SIM118 - safetensors' handle is no dict
                weight = replace(weight, branch=LowRank(*(file.get_tensor(f"{layer}.{part}") for part in _BRANCH_PARTS)))
        if not _is_sound(weight, shape):
            raise FormatError(f"{path}: {layer}: damaged, or of another model than one with a weight {shape}. Round this model again.")
        return weight

    @cached_property
    def _file_of(self) -> dict[str, Path]:
        """The file of every layer. Raises: CalibrationError if there is none."""
        found: dict[str, Path] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with open_tensors(path, ROUNDED_KEY, ROUNDED_VERSION, _KIND) as (_, file):
                found |= {key.removesuffix(".codes"): path for key in file.keys() if key.endswith(".codes")}  # noqa: SIM118
        if not found:
            raise CalibrationError(f"{self.folder}: holds no rounded weights. Make them with `reconstruct`, or use plain rounding.")
        return found

    def _path(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"


def _is_sound(weight: Int4Weight, shape: tuple[int, ...]) -> bool:
    N, K = shape
    expected = {"codes": ((N, K), torch.int8), "group_scale": ((K // GROUP_SIZE, N), torch.int8), "scale": ((N,), torch.float32)}
    for part, (size, dtype) in expected.items():
        tensor = getattr(weight, part)
        if tuple(tensor.shape) != size or tensor.dtype is not dtype:
            return False
    if weight.branch is not None and not _is_branch(weight.branch, shape):
        return False
    codes, steps, scale = weight.codes, weight.group_scale.short().abs(), weight.scale
    in_range = int(codes.min()) >= CODE_MIN and int(codes.max()) <= CODE_MAX
    return in_range and int(steps.min()) >= 1 and int(steps.max()) <= MAX_GROUP_SCALE and bool((scale > 0).all() & scale.isfinite().all())


def _is_branch(branch: LowRank, shape: tuple[int, ...]) -> bool:
    if branch.down.ndim != 2 or branch.up.ndim != 2 or (branch.up.shape[0], branch.down.shape[1]) != shape:
        return False
    parts = (branch.down, branch.up)
    sound = all(part.dtype is torch.float16 and bool(part.isfinite().all()) for part in parts)
    return sound and branch.down.shape[0] == branch.up.shape[1] > 0
