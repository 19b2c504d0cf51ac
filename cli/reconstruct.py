"""`reconstruct`: learns the rounding of 4-bit weights block by block, for `quantize --rounding reconstruct`. Writes no model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..quant.recipe import INT4_PRESETS
from .learned_rounding import Words, open_subject, train_and_report, training_text
from .open_model import DEMO
from .output import size_text

WORDS = Words("reconstruct", "Rounding block by block", "rounded")


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
    from ..hosts.diffusers.reconstruct import Reconstruction, reconstructed_layers
    from ..hosts.diffusers.reconstruct import reconstruct as run
    from ..hosts.diffusers.reconstruct_cost import reconstruction_cost
    from ..hosts.diffusers.trajectory import Sampling
    from ..quant.rounding.block import Training

    subject = open_subject(checkpoint, preset, recipe, calibration, prompts, device)
    unet, chosen, texts = subject.pipeline.unet, subject.recipe, subject.texts
    how = Reconstruction(Sampling(Reconstruction().sampling.steps, guidance, seed), training=Training(iterations, batch, seed))
    cost = reconstruction_cost(unet, reconstructed_layers(unet, chosen), len(texts), how)

    def train(statistics, progress) -> None:
        run(subject.pipeline, chosen, texts, out, how, statistics, progress)

    costs = _cost_text(cost, subject.on_cpu)
    train_and_report(WORDS, subject, out, cost, costs, f"{cost.blocks} blocks", train, dry_run, as_json)


def _cost_text(cost, on_cpu: bool) -> str:
    return (
        f"{cost.blocks} blocks on {cost.samples} samples: {cost.unet_calls} UNet calls, {training_text(cost, on_cpu)}, "
        f"{size_text(cost.memory_bytes)} of memory beside the model. Blocks that are done already are not done again."
    )
