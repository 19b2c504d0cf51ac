"""Corrections at no cost on the demo model and the hard variant: fitted on some prompts, judged on others.

    python benchmarks/corrections.py [--model demo] [--presets w8a8-token w4a8-token w8a8-static] [--device cpu] [--out benchmarks/results]

One JSON line for each preset and method is appended to corrections.jsonl: SQNR of the UNet's output on fp16's trajectory and of the
final latents, before and after, on held-out prompts. Of latents the median over prompts; the first records have their summed energies,
which one picture decides.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from pathlib import Path

import torch

from stepquant.demo.hard_variant import harden, read_factors
from stepquant.demo.pipeline import load_demo_pipeline
from stepquant.demo.prompts import CALIBRATION, SHOWN, seen_prompts
from stepquant.demo.record import command_line, environment, quality_record
from stepquant.demo.run import MODEL_NAME
from stepquant.hosts.diffusers.calibrate import calibrate
from stepquant.hosts.diffusers.corrections import correct_biases, fit_corrections, judge
from stepquant.hosts.diffusers.quantize import quantize_unet, unet_shapes
from stepquant.hosts.diffusers.trajectory import Sampling, record_trajectory
from stepquant.hosts.key_mapping import ldm_to_diffusers
from stepquant.quant.corrections.correction_file import Verdict
from stepquant.quant.layers import find_layers
from stepquant.quant.recipe import preset_recipe


def main() -> None:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("demo", "hard"), default="demo")
    parser.add_argument("--presets", nargs="+", default=["w8a8-token", "w4a8-token"])
    parser.add_argument("--prompts", type=int, default=16, help="to fit on; 8 others are judged")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipeline = load_demo_pipeline(device=args.device)
    if args.model == "hard":
        pipeline.unet = harden(pipeline.unet, read_factors())
    sampling = Sampling(args.steps)
    calibration = calibrate(pipeline, CALIBRATION[:4], Sampling(args.steps // 2), batch_size=4)
    fit_on = [*CALIBRATION, *(prompt for prompt in seen_prompts(64) if prompt not in SHOWN)][: args.prompts]
    held_out = record_trajectory(pipeline, SHOWN, sampling, len(SHOWN))
    for preset in args.presets:
        recipe = preset_recipe(preset, find_layers(unet_shapes(pipeline.unet)))
        unet = quantize_unet(copy.deepcopy(pipeline.unet), recipe, calibration)
        found = fit_corrections(pipeline, unet, fit_on, SHOWN, sampling, _say)
        verdicts = dict(found.verdicts)
        first = next(iter(verdicts.values()))
        correct_biases(unet, lambda name: pipeline.unet.get_submodule(ldm_to_diffusers(name)).weight, calibration)
        after = judge(pipeline, unet, SHOWN, held_out, sampling)
        verdicts["bias"] = Verdict(first.sqnr_before_db, after[0], first.latent_before_db, after[1])
        for method, verdict in verdicts.items():
            _append(args, preset, method, verdict)


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201


def _append(args: argparse.Namespace, preset: str, method: str, verdict: Verdict) -> None:
    model = MODEL_NAME if args.model == "demo" else f"{MODEL_NAME}-hard"
    record = quality_record("corrections", model, preset, None, 0, command_line())
    record["commit"] = record["commit"] or os.environ.get("STEPQUANT_COMMIT")
    figures = {name: round(value, 3) for name, value in vars(verdict).items()} | {"helps": verdict.helps}
    record |= {
        "sqnr_db": figures["sqnr_after_db"],
        "latent_sqnr_db": figures["latent_after_db"],
        "method": method,
        "latents": "median over prompts",
        **figures,
    }
    record |= {"fit_prompts": args.prompts, "held_out_prompts": len(SHOWN), "steps": args.steps, "device": args.device}
    with (args.out / "corrections.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record | environment()) + "\n")
    output, latents = "output {sqnr_before_db:.2f} -> {sqnr_after_db:.2f} dB", "latents {latent_before_db:.2f} -> {latent_after_db:.2f} dB"
    say = f"{{model}} {{mode}} {{method}}: {output}, {latents}, helps {{helps}}"
    print(say.format(**record))  # noqa: T201


if __name__ == "__main__":
    main()
