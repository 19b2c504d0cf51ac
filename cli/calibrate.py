"""`calibrate`: runs a checkpoint on a few prompts and saves the statistics that static scales are made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CalibrationError
from .atomic_write import check_writable
from .open_model import DEMO, choose_device, open_pipeline
from .output import console, print_json, progress_bar, size_text


def calibrate(
    checkpoint: Annotated[str, typer.Argument(help=f"SDXL checkpoint (.safetensors), or '{DEMO}' for the shipped demo model.")],
    out: Annotated[Path, typer.Argument(help="Calibration file to write (.safetensors).")],
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line; usual is 8 to 16 like those you will use.")] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampler steps; as many as you will sample with.")] = 20,
    guidance: Annotated[float, typer.Option(min=1.0, help="Classifier-free guidance scale.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture.")] = 0,
    mode: Annotated[
        str, typer.Option(help="full, srm (ADP-DM's steps), progressive (after quantized steps, PCR) or noisiest (the first).")
    ] = "full",
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also measure what `plan` needs; some hundred UNet calls more.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with OUT, which a cancelled run has left.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Record what every layer is given, for `quantize --preset w8a8-static --calibration OUT` and for `plan`."""
    from ..demo.prompts import CALIBRATION
    from ..hosts.diffusers.calibrate import calibrate as run
    from ..hosts.diffusers.calibrate import measure_sensitivity
    from ..hosts.diffusers.trajectory import Sampling
    from ..quant.calibration import Calibration, describe

    check_writable(out)
    check_mode(mode)
    texts = read_prompts(prompts, CALIBRATION)
    before = Calibration.load(out) if resume else None
    pipeline = open_pipeline(checkpoint, choose_device(device))
    sampling = Sampling(steps, guidance, seed)
    with progress_bar(quiet=as_json) as start:
        calibration = run(
            pipeline,
            texts,
            sampling,
            progress=start("Calibrating"),
            mode=mode,
            start=before,
            keep=lambda unfinished: unfinished.save(out),
        )
        if sensitivity:
            calibration.sensitivity = measure_sensitivity(pipeline, texts[0], sampling, progress=start("Measuring sensitivity"))
    calibration.save(out)
    summary = describe(calibration)
    if as_json:
        print_json({"file": str(out), "size_bytes": out.stat().st_size, **summary})
        return
    visited = f"{len(summary['buckets'])} of 64 timestep buckets"
    console.print(f"{out}: {summary['layers']} layers, {visited}, {len(texts)} prompts, {size_text(out.stat().st_size)}")


def check_mode(mode: str) -> None:
    """Raises CalibrationError if there is no such mode."""
    from ..quant.calibration_steps import CalibrationMode

    known = [one.value for one in CalibrationMode]
    if mode not in known:
        raise CalibrationError(f"mode {mode!r}: unknown. Choose one of {', '.join(known)}.")


def read_prompts(file: Path | None, default: Sequence[str]) -> list[str]:
    """One prompt a line; `default` without a file. Raises CalibrationError if it cannot be read or is empty."""
    if file is None:
        return list(default)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{file}: cannot read the prompts ({error}). Give a text file in UTF-8, one prompt a line.") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise CalibrationError(f"{file}: holds no prompts. Write one prompt a line.")
    return prompts
