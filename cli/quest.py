"""`quest`: tunes feed-forward and time layers' 4-bit weights and scales, for `quantize --rounding quest`. Writes no model."""

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
from .quantize import read_recipe, read_rounding

DEFAULT_PROMPTS = 24


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

    from ..demo.prompts import seen_prompts
    from ..hosts.diffusers.quantize import unet_shapes
    from ..hosts.diffusers.quest import GIB, Quest, quest_parts
    from ..hosts.diffusers.quest import quest as run
    from ..hosts.diffusers.quest_cost import quest_cost
    from ..hosts.diffusers.trajectory import Sampling
    from ..quant.calibration import Calibration
    from ..quant.layers import find_layers
    from ..quant.recipe import preset_recipe

    start_from = read_rounding(rounding, hessians, blocks)
    texts = read_prompts(prompts, seen_prompts(DEFAULT_PROMPTS))
    chosen = None if recipe is None else read_recipe(recipe)
    if chosen is not None and chosen.needs_calibration and calibration is None:
        raise CalibrationError(f"{recipe}: has static layers. Give the --calibration it was planned with.")
    pipeline = open_pipeline(checkpoint, choose_device(device))
    layers = find_layers(unet_shapes(pipeline.unet))
    chosen = chosen or preset_recipe(preset, layers)
    training = replace(Quest().training, steps=steps, seed=seed)
    on_gpu = pipeline.device.type != "cpu"
    how = Quest(Sampling(Quest().sampling.steps, guidance, seed), training=training, memory_bytes=int(memory * GIB), exact=on_gpu)
    cost = quest_cost(pipeline.unet, chosen, layers, quest_parts(pipeline.unet, chosen, how.memory_bytes), len(texts), how)
    if not as_json:
        console.print(_cost_text(cost, on_gpu), soft_wrap=True)
    if not dry_run:
        statistics = Calibration.load(calibration) if calibration else None
        with progress_bar(quiet=as_json) as start:
            run(pipeline, chosen, texts, out, how, start_from, statistics, start("Tuning part by part"))
    if as_json:
        print_json({"folder": str(out), "tuned": not dry_run, **asdict(cost)})
    elif not dry_run:
        console.print(f"{out}: {cost.values} weights. Now: quantize --rounding quest --blocks {out}", soft_wrap=True)


def _cost_text(cost, on_gpu: bool) -> str:
    from ..hosts.rounding_cost import SHARE_REACHED, matmul_speed

    training = f"{cost.operations / 1e12:.1f} TFLOP of training"
    if not on_gpu:
        training += f" (about {max(1, round(cost.seconds(SHARE_REACHED * matmul_speed()) / 60))} min here)"
    return (
        f"{cost.values} weights in {cost.parts} {'part' if cost.parts == 1 else 'parts'}: {cost.unet_calls} UNet calls to record, "
        f"{training}, "
        f"{size_text(cost.memory_bytes)} of memory beside the quantized model, {size_text(cost.ram_bytes)} of RAM, "
        f"{size_text(cost.disk_bytes)} on disk. Parts that are done already are not done again."
    )
