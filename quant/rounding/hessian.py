"""What GPTQ needs to know of a layer's inputs: mean over rows x of x x^T, one file for each input. Does not run models.

A convolution's rows hold all its taps. Layers that read the same tensor share one. Layers that only ever read a few different rows have
none: GPTQ would fit those.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CalibrationError, FormatError
from ..atomic_file import save_tensors
from ..layers import LayerSpec, needs_row_scales
from ..safe_header import open_tensors

HESSIAN_KEY = "stepquant_hessian"
HESSIAN_VERSION = 1
# Self-attention's q, k and v read one norm's output.
_SHARED = re.compile(r"(\.attn1)\.to_[qkv]$")
# Of the longest sums that are rounded by a Hessian: 1280 channels under a 3x3 kernel take 530 MB, 2560 would take four times that.
LONGEST_SUM = 9 * 1280


def uses_hessian(layer: str) -> bool:
    """False for layers that read the prompt or the timestep: a few hundred different rows, whatever is calibrated on.

    On the demo model, GPTQ of the prompt's keys and values lost 1.4 dB on prompts that it had not seen.
    """
    return not needs_row_scales(layer)


def has_hessian(spec: LayerSpec) -> bool:
    """Whether one can be gathered of a layer's input, for 8-bit weights; 4-bit ones are of Linears only."""
    return uses_hessian(spec.name) and spec.sum_length <= LONGEST_SUM


def input_of(layer: str) -> str:
    """The name of a layer's input; layers with the same one read the same tensor."""
    return _SHARED.sub(r"\1.to_q", layer)


def readers(layers: Iterable[str]) -> dict[str, str]:
    """Input name -> one layer that reads it."""
    found: dict[str, str] = {}
    for layer in layers:
        found.setdefault(input_of(layer), layer)
    return found


class HessianObserver:
    """Sums x x^T over all rows that a layer is given, in fp32 on the input's device."""

    def __init__(self, length: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(length, length, device=device)
        self.rows = 0

    def update(self, x: Tensor) -> None:
        """x: (..., K), any float dtype; left unchanged."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.total.addmm_(rows.t(), rows)
        self.rows += rows.shape[0]

    def mean(self, name: str) -> Tensor:
        """(K, K), over the rows. Raises: CalibrationError naming the input if nothing finite was seen."""
        if not self.rows or not bool(torch.isfinite(self.total).all()):
            raise CalibrationError(f"{name}: {self.rows} rows seen, or some not finite. Calibrate with a model that makes sound pictures.")
        return self.total / self.rows


@dataclass(frozen=True)
class HessianFolder:
    """The inputs of one model on one set of prompts. summary: what they were gathered on, JSON values only; None to accept any."""

    folder: Path
    summary: Mapping[str, object] | None = None

    def has(self, name: str) -> bool:
        """Whether the input's file is there; raises if it is of other settings, so that a resumed run mixes none."""
        path = self._path(name)
        if not path.is_file():
            return False
        self._check(path)
        return True

    def write(self, name: str, observer: HessianObserver) -> None:
        """Raises: FormatError if it cannot be written; CalibrationError if nothing finite was seen."""
        mean = observer.mean(name).cpu()
        self.folder.mkdir(parents=True, exist_ok=True)
        upper = torch.triu_indices(*mean.shape)
        mean = mean[upper[0], upper[1]]
        header = {"version": HESSIAN_VERSION, "name": name, "rows": observer.rows, "summary": dict(self.summary or {})}
        save_tensors(self._path(name), {"upper": mean}, {HESSIAN_KEY: json.dumps(header)})

    def find(self, layer: str, device: torch.device | str = "cpu") -> Tensor | None:
        """As read, but None if the layer's input was not gathered."""
        return self.read(layer, device) if self.covers(layer) else None

    def covers(self, layer: str) -> bool:
        """Whether the layer's input was gathered. Opens no file."""
        return self._path(input_of(layer)).is_file()

    def read(self, layer: str, device: torch.device | str = "cpu") -> Tensor:
        """(K, K) fp32, the mean of x x^T over the rows of a layer's input.

        Raises: CalibrationError if the layer was not observed; FormatError if its file is damaged or of other settings.
        """
        path = self._path(input_of(layer))
        if not path.is_file():
            raise CalibrationError(f"{layer}: {path} is missing, and GPTQ needs it. Gather Hessians of this model, or use plain rounding.")
        self._check(path)
        with open_tensors(path, HESSIAN_KEY, HESSIAN_VERSION, "a StepQuant Hessian") as (_, file):
            upper = file.get_tensor("upper").to(device)
        K = int((2 * upper.numel()) ** 0.5)
        if upper.ndim != 1 or upper.numel() != K * (K + 1) // 2 or upper.dtype is not torch.float32:
            raise FormatError(f"{path}: the file is damaged. Gather the Hessians again.")
        rows, columns = torch.triu_indices(K, K, device=device)
        matrix = torch.empty(K, K, device=device)
        matrix[rows, columns] = upper
        matrix[columns, rows] = upper
        return matrix

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _check(self, path: Path) -> None:
        with open_tensors(path, HESSIAN_KEY, HESSIAN_VERSION, "a StepQuant Hessian") as (header, _):
            found = header.get("summary")
        if self.summary is not None and found != dict(self.summary):
            raise CalibrationError(f"{path}: gathered with other settings ({found}). Use the same ones, or another folder.")


def hessian_bytes(layers: Mapping[str, LayerSpec]) -> int:
    """Memory of the Hessians of all inputs of these layers at once; half of it on disk."""
    return sum(4 * layers[layer].sum_length ** 2 for layer in readers(layers).values())
