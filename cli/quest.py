"""`quest`: tunes feed-forward and time layers' 4-bit weights and scales, for `quantize --rounding quest`. Writes no model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..quant.recipe import INT4_PRESETS
from .learned_rounding import Words, open_subject, train_and_report, training_text
from .open_model import DEMO
from .output import size_text
from .quantize import read_rounding

WORDS = Words("quest", "Tuning part by part", "tuned")


def quest(
    checkpoint: Annotated[str, typer.Argument(help=f"SDXL checkpoint (.safetensors), or '{DEMO}' for the shipped demo model.")],
    out: Annotated[Path, typer.Argument(help="Folder for one file per part; a killed run goes on where it was.")],
    preset: Annotated[str, typer.Option(help=f"{' or '.join(INT4_PRESETS)}: which layers have 4 bits.")] = INT4_PRESETS[-1],
    recipe: Annotated[Path | None, typer.Option(help="File made by `plan --int4`; then --preset is not used.")] = None,
    rounding: Annotated[
        str, typer.Option(help="What to start from: plain, gptq (needs --hessians) or reconstruct (needs --blocks).")
    ] = "plain",
    hessians: Annotated[Path | None, typer.Option(help="Folder made by `hessians` on this model.")] = None,
    blocks: Annotated[Path | None, typer.Option(help="Folder made by `reconstruct` on this model with this preset or recipe.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="File made by `calibrate`, if the recipe has static layers.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line; 24 or more, as different as you can.")] = None,
    steps: Annotated[int, typer.Option(min=1, max=100_000, help="Training steps of each part. Usual is 300.")] = 300,
    memory: Annotated[
        float, typer.Option(min=0.1, help="GiB for the layers in training at a time; less means more parts, and time.")
    ] = 2.0,
    guidance: Annotated[float, typer.Option(min=1.0, help="Classifier-free guidance scale.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fine-tune 4-bit feed-forward and time layers for what the whole UNet answers, from any other rounding."""
    from dataclasses import replace

    from ..hosts.diffusers.quest import GIB, Quest, quest_parts
    from ..hosts.diffusers.quest import quest as run
    from ..hosts.diffusers.quest_cost import quest_cost
    from ..hosts.diffusers.trajectory import Sampling

    start_from = read_rounding(rounding, hessians, blocks)
    subject = open_subject(checkpoint, preset, recipe, calibration, prompts, device)
    unet, chosen, texts = subject.pipeline.unet, subject.recipe, subject.texts
    training = replace(Quest().training, steps=steps, seed=seed)
    sampling = Sampling(Quest().sampling.steps, guidance, seed)
    how = Quest(sampling, training=training, memory_bytes=int(memory * GIB), exact=not subject.on_cpu)
    cost = quest_cost(unet, chosen, subject.layers, quest_parts(unet, chosen, how.memory_bytes), len(texts), how)

    def train(statistics, progress) -> None:
        run(subject.pipeline, chosen, texts, out, how, start_from, statistics, progress)

    costs = _cost_text(cost, subject.on_cpu)
    train_and_report(WORDS, subject, out, cost, costs, f"{cost.values} weights", train, dry_run, as_json)


def _cost_text(cost, on_cpu: bool) -> str:
    return (
        f"{cost.values} weights in {cost.parts} {'part' if cost.parts == 1 else 'parts'}: {cost.unet_calls} UNet calls to record, "
        f"{training_text(cost, on_cpu)}, "
        f"{size_text(cost.memory_bytes)} of memory beside the quantized model, {size_text(cost.ram_bytes)} of RAM, "
        f"{size_text(cost.disk_bytes)} on disk. Parts that are done already are not done again."
    )
