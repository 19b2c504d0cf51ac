"""`corrections`: fits corrections of a quantized model's noise estimate, and says which of them help on prompts they were not fitted on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .atomic_write import check_writable
from .calibrate import read_prompts
from .open_model import DEMO, choose_device, open_candidate, open_pipeline
from .output import console, print_json, stderr


def corrections(
    base: Annotated[str, typer.Argument(help=f"The 16-bit SDXL checkpoint (.safetensors), or '{DEMO}' for the demo model.")],
    quantized: Annotated[str, typer.Argument(help="The quantized file, made from BASE.")],
    out: Annotated[Path, typer.Argument(help="File of corrections to write (.safetensors).")],
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line, to fit on; usual is 16.")] = None,
    held_out: Annotated[Path | None, typer.Option(help="Text file, one prompt a line, to judge on: none of those fitted on.")] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampler steps; as many as you will sample with.")] = 20,
    guidance: Annotated[float, typer.Option(min=1.0, help="Classifier-free guidance scale.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON.")] = False,
) -> None:
    """PTQD, TAC-Diffusion and input bias, for the node Apply corrections. Off there unless they help here."""
    from ..demo.prompts import CALIBRATION, SHOWN
    from ..hosts.diffusers.corrections import fit_corrections
    from ..hosts.diffusers.trajectory import Sampling
    from ..quant.corrections.correction_file import save_corrections
    from ..version import VERSION

    check_writable(out)
    texts, others = read_prompts(prompts, CALIBRATION), read_prompts(held_out, SHOWN)
    pipeline = open_pipeline(base, choose_device(device))
    unet = open_candidate(quantized, pipeline)
    say = None if as_json else lambda text: stderr.print(f"{text} ...")
    found = fit_corrections(pipeline, unet, texts, others, Sampling(steps, guidance, seed), say)
    save_corrections(found, out, VERSION)
    if as_json:
        verdicts = {name: vars(verdict) | {"helps": verdict.helps} for name, verdict in found.verdicts.items()}
        print_json({"file": str(out), "chosen": found.chosen(), "verdicts": verdicts})
        return
    for line in found.lines():
        console.print(line, soft_wrap=True)
    console.print(f"{out}: {found.chosen() or 'none of them helps, so the node will use none'}", soft_wrap=True)
