"""Trains the logarithms of a scale set by Adam on whatever loss a host computes; can stop and go on. Knows no models.

Step i draws its examples from a generator seeded by (seed, i), so a run that was stopped and resumed makes the same factors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import CalibrationError, FormatError
from ..atomic_file import save_tensors
from ..safe_header import open_tensors
from .scale_set import LARGEST_LOG_FACTOR

STATE_KEY = "stepquant_tuning_state"
STATE_VERSION = 1
STATE_KIND = "the state of a scale tuning run"
# Adam's usual second-moment decay averages over 1000 steps; runs here have some hundred.
BETAS = (0.9, 0.99)
EPSILON = 1e-8
WARM_UP_STEPS = 10
LAST_RATE = 0.1  # of the learning rate, at the end of the cosine
# Found on the demo model: a subject needs scales that move by tens of percents, a repair by a few.
SUBJECT_RATE, REPAIR_RATE = 1e-2, 1e-3

# (step, generator) -> loss, a scalar with gradients into the logarithms
Loss = Callable[[int, torch.Generator], Tensor]
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class TuningSettings:
    """learning_rate: of the log factors, so 0.005 moves a scale by 0.5 % a step at most. prior_weight: of keeping everything else."""

    steps: int = 300
    learning_rate: float = 5e-3
    batch_size: int = 4
    experts: int = 1
    prior_weight: float = 1.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """Warm-up, then a cosine."""
        share = step / max(1, self.steps)
        cosine = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * share))
        return self.learning_rate * min(1.0, (step + 1) / WARM_UP_STEPS) * cosine


@dataclass
class TuningState:
    """A run after `step` steps. logs, mean, square: all log factors and Adam's two moments, flat, fp32, in the scale set's order."""

    step: int
    settings: TuningSettings
    logs: Tensor
    mean: Tensor
    square: Tensor

    def save(self, path: str | Path) -> None:
        """Raises FormatError if the folder cannot be written."""
        header = {"version": STATE_VERSION, "step": self.step, "settings": asdict(self.settings)}
        save_tensors(path, {name: getattr(self, name) for name in _TENSORS}, {STATE_KEY: json.dumps(header), "format": "pt"})


_TENSORS = ("logs", "mean", "square")


def load_state(path: str | Path) -> TuningState:
    """Raises FormatError naming the file if it is missing, damaged or no such state."""
    with open_tensors(path, STATE_KEY, STATE_VERSION, STATE_KIND) as (header, file):
        step, settings = header.get("step"), header.get("settings")
        known = set(TuningSettings.__dataclass_fields__)
        if (
            type(step) is not int
            or step < 0
            or not isinstance(settings, dict)
            or set(settings) != known
            or set(file.keys()) != set(_TENSORS)
        ):
            raise FormatError(f"{path}: the file is damaged. Start the tuning anew.")
        tensors = [file.get_tensor(name) for name in _TENSORS]
    if any(tensor.dtype is not torch.float32 or tensor.ndim != 1 or tensor.shape != tensors[0].shape for tensor in tensors):
        raise FormatError(f"{path}: the file is damaged (its tensors differ in length). Start the tuning anew.")
    return TuningState(step, TuningSettings(**settings), *tensors)


def train(
    logs: Mapping[str, nn.Parameter],
    loss: Loss,
    settings: TuningSettings,
    start: TuningState | None = None,
    progress: Progress | None = None,
    on_cancel: Callable[[TuningState], None] | None = None,
    loss_scale: float = 1.0,
) -> TuningState:
    """Minimise `loss` over the logarithms, in place.

    Args:
        start: an unfinished run of the same settings, to go on from.
        progress: called with (steps done, steps in all, smoothed loss); raising in it cancels.
        on_cancel: given the state if the run is cancelled.
        loss_scale: gradients flow back multiplied with it; halved, and the step left out, where they overflow.
    Raises: CalibrationError if `start` is of other settings or another model, or the loss is not finite.
    """
    parameters = list(logs.values())
    step, mean, square = _begin(parameters, settings, start)
    smoothed = math.nan

    def state() -> TuningState:
        return TuningState(step, settings, *(_flat(tensors) for tensors in (parameters, mean, square)))

    try:
        while step < settings.steps:
            generator = torch.Generator("cpu").manual_seed(settings.seed * 1_000_003 + step)
            value = loss(step, generator)
            gradients = torch.autograd.grad(value * loss_scale, parameters, allow_unused=True)
            number = float(value.detach())
            if not math.isfinite(number):
                raise CalibrationError(f"tuning: the loss is {number} after {step} steps. Use a lower learning rate.")
            if loss_scale > 1 and any(gradient is not None and not bool(gradient.isfinite().all()) for gradient in gradients):
                loss_scale /= 2
            else:
                _adam(
                    parameters,
                    [None if one is None else one / loss_scale for one in gradients],
                    mean,
                    square,
                    settings.rate(step),
                    step + 1,
                )
            step += 1
            smoothed = number if math.isnan(smoothed) else 0.95 * smoothed + 0.05 * number
            if progress is not None:
                progress(step, settings.steps, smoothed)
    except BaseException:
        if on_cancel is not None:
            on_cancel(state())
        raise
    return state()


def _begin(parameters: list[nn.Parameter], settings: TuningSettings, start: TuningState | None) -> tuple[int, list[Tensor], list[Tensor]]:
    if start is None:
        return 0, [torch.zeros_like(one) for one in parameters], [torch.zeros_like(one) for one in parameters]
    values = sum(one.numel() for one in parameters)
    if start.settings != settings or start.logs.numel() != values:
        raise CalibrationError(
            f"resume: the unfinished run has {start.logs.numel()} scales and {start.settings}; this one has {values} and {settings}. "
            "Give the same model and settings, or start anew."
        )
    sizes = [one.numel() for one in parameters]
    with torch.no_grad():
        for one, part in zip(parameters, start.logs.split(sizes), strict=True):
            one.copy_(part.view_as(one))
    moments = [
        [part.view_as(one).to(one.device).clone() for one, part in zip(parameters, flat.split(sizes), strict=True)]
        for flat in (start.mean, start.square)
    ]
    return start.step, *moments


@torch.no_grad()
def _adam(parameters: list, gradients: list, mean: list, square: list, rate: float, count: int) -> None:
    """Adam (arXiv 1412.6980, algorithm 1) on log factors, kept in the range that a file can hold."""
    corrections = [1 - beta**count for beta in BETAS]
    for parameter, gradient, m, v in zip(parameters, gradients, mean, square, strict=True):
        if gradient is None:
            continue
        m.lerp_(gradient, 1 - BETAS[0])
        v.lerp_(gradient.square(), 1 - BETAS[1])
        parameter.sub_(rate * (m / corrections[0]) / ((v / corrections[1]).sqrt() + EPSILON))
        parameter.clamp_(-LARGEST_LOG_FACTOR, LARGEST_LOG_FACTOR)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().cpu() for tensor in tensors]) if tensors else torch.zeros(0)
