"""Tells whether a scale LoRA belongs to a model: by a sample of weights that are never quantized, as no file hash survives
another container (UNet alone or whole checkpoint), another recipe, or a model that was never a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...errors import ModelError

SAMPLED = ("input_blocks.0.0.weight", "time_embed.2.weight", "label_emb.0.2.weight", "out.2.weight")
VALUES_PER_TENSOR = 16
# bf16 moves values by up to 0.4 %, 0.17 % in the mean; another training of the model moves these layers by percents.
TOLERANCE = 0.005


def identity(read: Callable[[str], Tensor], base_model: Mapping[str, str | None]) -> dict[str, object]:
    """What to remember of a model. read: an unquantized UNet tensor by its LDM name. base_model: {"name", "sha256"}, as far as known."""
    return {"name": base_model.get("name"), "sha256": base_model.get("sha256"), "sample": _sample(read)}


def check_identity(
    remembered: Mapping[str, object], read: Callable[[str], Tensor], base_model: Mapping[str, str | None], file: str
) -> None:
    """Raise ModelError, naming both models, if `remembered` is of another one."""
    if distance(remembered, _sample(read)) <= TOLERANCE:
        return
    found = base_model.get("name") or "another model"
    raise ModelError(
        f"{file}: made for {remembered.get('name') or 'an unnamed model'}, and this is {found}: their unquantized weights differ. "
        "Connect the model that it was tuned on, or make a new file for this one."
    )


def distance(remembered: Mapping[str, object], sample: list[float]) -> float:
    """Relative distance of two samples; infinite if they cannot be compared."""
    known = remembered.get("sample")
    if not isinstance(known, list) or len(known) != len(sample) or not all(type(value) in (int, float) for value in known):
        return float("inf")
    known, sample = torch.tensor(known, dtype=torch.float64), torch.tensor(sample, dtype=torch.float64)
    return float((known - sample).norm() / sample.norm().clamp_min(1e-12))


def _sample(read: Callable[[str], Tensor]) -> list[float]:
    """Each tensor's values relative to its largest, so that none outweighs the others."""
    found: list[float] = []
    for name in SAMPLED:
        values = read(name).flatten()
        values = values[:: max(1, values.numel() // VALUES_PER_TENSOR)][:VALUES_PER_TENSOR].float().cpu()
        found += (values / values.abs().max().clamp_min(1e-12)).tolist()
    return [round(value, 5) for value in found]
