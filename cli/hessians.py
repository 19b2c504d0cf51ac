"""`hessians`: runs a checkpoint on a few prompts and saves what GPTQ rounds weights by. Rounds nothing itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import SchemeError
from ..quant.scheme import WEIGHT_BITS
from .calibrate import read_prompts
from .open_model import DEMO, choose_device, open_pipeline
from .output import console, print_json, progress_bar, size_text

# GPTQ fits what it is shown: on the demo model more prompts help more than more steps.
DEFAULT_PROMPTS = 40


def hessians(
    checkpoint: Annotated[str, typer.Argument(help=f"SDXL checkpoint (.safetensors), or '{DEMO}' for the shipped demo model.")],
    out: Annotated[Path, typer.Argument(help="Folder for one file per layer input; a cancelled run goes on where it was.")],
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line; 32 or more, as different as you can.")] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampler steps; a few are enough.")] = 6,
    guidance: Annotated[float, typer.Option(min=1.0, help="Classifier-free guidance scale.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture.")] = 0,
    bits: Annotated[int, typer.Option(help="Of the weights to be rounded: 4 (Linears), or 8 (convolutions too: far more disk).")] = 4,
    memory: Annotated[float, typer.Option(min=0.1, help="GiB for what is gathered at a time; less means more runs.")] = 4.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Record how the inputs of every layer go together, for `quantize --rounding gptq --hessians OUT`."""
    from dataclasses import asdict

    from ..demo.prompts import seen_prompts
    from ..hosts.diffusers.hessians import GIB, gather_hessians, hessian_cost, hessian_layers
    from ..hosts.diffusers.trajectory import Sampling

    if bits not in WEIGHT_BITS:
        raise SchemeError(f"--bits {bits}: weights have {' or '.join(map(str, WEIGHT_BITS))} bits. Give one of these.")
    texts = read_prompts(prompts, seen_prompts(DEFAULT_PROMPTS))
    pipeline = open_pipeline(checkpoint, choose_device(device))
    sampling, batch, budget = Sampling(steps, guidance, seed), 2, int(memory * GIB)
    cost = hessian_cost(hessian_layers(pipeline.unet, bits), len(texts), sampling, batch, budget)
    if not as_json:
        console.print(
            f"{cost.inputs} inputs in {cost.runs} {'run' if cost.runs == 1 else 'runs'}: {cost.unet_calls} UNet calls of {batch} prompts, "
            f"{size_text(cost.memory_bytes)} of memory beside the model, {size_text(cost.disk_bytes)} on disk",
            soft_wrap=True,
        )
    if not dry_run:
        with progress_bar(quiet=as_json) as start:
            gather_hessians(pipeline, texts, out, sampling, batch, budget, start("Gathering Hessians"), bits)
    if as_json:
        print_json({"folder": str(out), "gathered": not dry_run, **asdict(cost)})
    elif not dry_run:
        console.print(f"{out}: {cost.inputs} inputs, {len(texts)} prompts")
