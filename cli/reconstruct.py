"""`reconstruct`: learns the rounding of 4-bit weights block by block, for `quantize --rounding reconstruct`. Writes no model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CalibrationError
from ..quant.recipe import INT4_PRESETS
from .calibrate import read_prompts
from .open_model import DEMO, choose_device, open_pipeline
from .output import console, print_json, progress_bar, size_text
from .quantize import read_recipe

DEFAULT_PROMPTS = 24


def reconstruct(
    checkpoint: Annotated[str, typer.Argument(help=f"SDXL checkpoint (.safetensors), or '{DEMO}' for the shipped demo model.")],
    out: Annotated[Path, typer.Argument(help="Folder for one file per block; a killed run goes on where it was.")],
    preset: Annotated[str, typer.Option(help=f"{' or '.join(INT4_PRESETS)}: which layers have 4 bits.")] = INT4_PRESETS[-1],
    recipe: Annotated[Path | None, typer.Option(help="File made by `plan --int4`; then --preset is not used.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="File made by `calibrate`, if the recipe has static layers.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line; 24 or more, as different as you can.")] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Training steps of each block.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Samples a step; fewer take less memory.")] = 16,
    guidance: Annotated[float, typer.Option(min=1.0, help="Classifier-free guidance scale.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Round 4-bit weights for what whole blocks of the UNet answer: slower than GPTQ, and nearer to the 16-bit model."""
    from ..demo.prompts import seen_prompts
    from ..hosts.diffusers.quantize import unet_shapes
    from ..hosts.diffusers.reconstruct import Reconstruction, reconstruct, reconstructed_layers
    from ..hosts.diffusers.reconstruct_cost import reconstruction_cost
    from ..hosts.diffusers.trajectory import Sampling
    from ..quant.calibration import Calibration
    from ..quant.layers import find_layers
    from ..quant.recipe import preset_recipe
    from ..quant.rounding.block import Training

    texts = read_prompts(prompts, seen_prompts(DEFAULT_PROMPTS))
    chosen = None if recipe is None else read_recipe(recipe)
    if chosen is not None and chosen.needs_calibration and calibration is None:
        raise CalibrationError(f"{recipe}: has static layers. Give the --calibration it was planned with.")
    pipeline = open_pipeline(checkpoint, choose_device(device))
    chosen = chosen or preset_recipe(preset, find_layers(unet_shapes(pipeline.unet)))
    how = Reconstruction(Sampling(Reconstruction().sampling.steps, guidance, seed), training=Training(iterations, batch, seed))
    cost = reconstruction_cost(pipeline.unet, reconstructed_layers(pipeline.unet, chosen), len(texts), how)
    if not as_json:
        console.print(_cost_text(cost, pipeline.device.type == "cpu"), soft_wrap=True)
    if not dry_run:
        statistics = Calibration.load(calibration) if calibration else None
        with progress_bar(quiet=as_json) as start:
            reconstruct(pipeline, chosen, texts, out, how, statistics, start("Rounding block by block"))
    if as_json:
        print_json({"folder": str(out), "rounded": not dry_run, **asdict(cost)})
    elif not dry_run:
        console.print(f"{out}: {cost.blocks} blocks. Now: quantize --rounding reconstruct --blocks {out}", soft_wrap=True)


def _cost_text(cost, on_cpu: bool) -> str:
    from ..hosts.rounding_cost import SHARE_REACHED, matmul_speed

    training = f"{cost.operations / 1e12:.1f} TFLOP of training"
    if on_cpu:
        training += f" (about {max(1, round(cost.seconds(SHARE_REACHED * matmul_speed()) / 60))} min here)"
    return (
        f"{cost.blocks} blocks on {cost.samples} samples: {cost.unet_calls} UNet calls, {training}, "
        f"{size_text(cost.memory_bytes)} of memory beside the model. Blocks that are done already are not done again."
    )
