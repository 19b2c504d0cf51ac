"""What `quest` and `reconstruct` have in common: open and check, say what it would take, run, report. Trains nothing itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import CalibrationError
from .calibrate import read_prompts
from .open_model import choose_device, open_pipeline
from .output import console, print_json, progress_bar
from .quantize import read_recipe

DEFAULT_PROMPTS = 24


@dataclass(frozen=True)
class Subject:
    """What is rounded, and what it is trained on. calibration: the file that static layers need, or None."""

    pipeline: Any
    layers: dict
    recipe: Any
    texts: list[str]
    calibration: Path | None

    @property
    def on_cpu(self) -> bool:
        return self.pipeline.device.type == "cpu"


def open_subject(checkpoint: str, preset: str, recipe: Path | None, calibration: Path | None, prompts: Path | None, device: str) -> Subject:
    """Raises: CalibrationError if the recipe has static layers and no calibration is given."""
    from ..demo.prompts import seen_prompts
    from ..hosts.diffusers.quantize import unet_shapes
    from ..quant.layers import find_layers
    from ..quant.recipe import preset_recipe

    texts = read_prompts(prompts, seen_prompts(DEFAULT_PROMPTS))
    chosen = None if recipe is None else read_recipe(recipe)
    if chosen is not None and chosen.needs_calibration and calibration is None:
        raise CalibrationError(f"{recipe}: has static layers. Give the --calibration it was planned with.")
    pipeline = open_pipeline(checkpoint, choose_device(device))
    layers = find_layers(unet_shapes(pipeline.unet))
    return Subject(pipeline, layers, chosen or preset_recipe(preset, layers), texts, calibration)


@dataclass(frozen=True)
class Words:
    """Of one command. rounding: its name for `quantize`. progress: beside the bar. done: its key in the JSON."""

    rounding: str
    progress: str
    done: str


def train_and_report(
    words: Words, subject: Subject, out: Path, cost: Any, costs: str, made: str, train: Callable[..., Any], dry_run: bool, as_json: bool
) -> None:
    """Say what it would take, then do it unless `dry_run`.

    Args:
        cost: a dataclass, for the JSON. costs: the same in words. made: what is in `out` afterwards, in words.
        train: called with the calibration's statistics, or None, and a progress callback.
    """
    from ..quant.calibration import Calibration

    if not as_json:
        console.print(costs, soft_wrap=True)
    if not dry_run:
        statistics = Calibration.load(subject.calibration) if subject.calibration else None
        with progress_bar(quiet=as_json) as start:
            train(statistics, start(words.progress))
    if as_json:
        print_json({"folder": str(out), words.done: not dry_run, **asdict(cost)})
    elif not dry_run:
        console.print(f"{out}: {made}. Now: quantize --rounding {words.rounding} --blocks {out}", soft_wrap=True)


def training_text(cost: Any, on_cpu: bool) -> str:
    """How much training it is, and on a CPU how long it takes here. cost: with `operations` and `seconds(operations a second)`."""
    from ..hosts.rounding_cost import SHARE_REACHED, matmul_speed

    text = f"{cost.operations / 1e12:.1f} TFLOP of training"
    if on_cpu:
        text += f" (about {max(1, round(cost.seconds(SHARE_REACHED * matmul_speed()) / 60))} min here)"
    return text
