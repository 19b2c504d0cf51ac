"""Quality of the presets on the demo model against fp16, same seeds: the acceptance run. Judges no prompt adherence.

    python benchmarks/quality.py [--prompts 64] [--steps 20] [--out benchmarks/results] [--per-layer] [--device cpu]

SQNR is that of the UNet's output on fp16's own trajectory: energies summed over prompts per step, mean of dB over steps.
One JSON record per format is written to --out. Exit code 1 if a requirement is missed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from layer_quality import layer_sqnr
from torch import Tensor, nn

from stepquant.demo.pipeline import load_demo_pipeline
from stepquant.demo.prompts import CALIBRATION, heldout_prompts, seen_prompts
from stepquant.demo.record import command_line, environment, quality_record
from stepquant.demo.run import MODEL_NAME, UNET_FILE
from stepquant.hosts.diffusers.calibrate import calibrate
from stepquant.hosts.diffusers.fidelity import Fidelity, Reference, psnr_db, record_reference
from stepquant.hosts.diffusers.quantize import attach_counter, quantize_unet, unet_shapes
from stepquant.hosts.diffusers.trajectory import Sampling, decode_latents, replay, sample_latents, unet_in_place
from stepquant.hosts.diffusers.unet_file import save
from stepquant.quant.layers import find_layers
from stepquant.quant.mac_counter import MacCounter
from stepquant.quant.recipe import PRESETS, preset_recipe
from stepquant.quant.sqnr import StepSqnr, sqnr_db

PROMPTS_PER_PART = 8  # bounds the memory of recorded trajectories
CALIBRATION_SEED = 10_000
# What the presets must reach; static against token.
MIN_SQNR_DB, MIN_LATENT_SQNR_DB, MAX_STATIC_LOSS_DB, MIN_INTEGER_SHARE = 30.0, 20.0, 3.0, 0.98


@dataclass
class Candidate:
    """One quantized UNet and what was measured on it so far."""

    mode: str
    unet: nn.Module
    size_bytes: int
    steps: StepSqnr = field(default_factory=StepSqnr)
    counter: MacCounter = field(default_factory=MacCounter)
    latents: list[Tensor] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    sampled: int = 0
    seconds: float = 0.0


def main() -> int:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--modes", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--per-layer", action="store_true", help="also each layer's own SQNR, worst first")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    prompts = _prompts(args.prompts)
    pipeline = load_demo_pipeline(device=args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    candidates = _quantize(pipeline, args)
    records = []
    for latents, layers in _measure(pipeline, candidates, prompts, args):
        records = [_record(candidate, latents, layers.get(candidate.mode), args) for candidate in candidates]
        for record in records:
            # Rewritten after every part, so that a run cut short leaves what it measured.
            file = args.out / f"quality-{record['mode']}.json"
            file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return _judge(records)


def _prompts(count: int) -> list[str]:
    """Trained and held-out prompts in turn."""
    pairs = zip(seen_prompts((count + 1) // 2), heldout_prompts((count + 1) // 2), strict=True)
    return [prompt for pair in pairs for prompt in pair][:count]


def _quantize(pipeline, args: argparse.Namespace) -> list[Candidate]:
    layers = find_layers(unet_shapes(pipeline.unet))
    calibration = None
    if "w8a8-static" in args.modes:
        sampling = Sampling(args.steps, args.guidance, CALIBRATION_SEED)
        calibration = calibrate(pipeline, CALIBRATION, sampling, progress=_progress("calibrating"))
    candidates = []
    for mode in args.modes:
        unet = quantize_unet(copy.deepcopy(pipeline.unet), preset_recipe(mode, layers, args.groups), calibration)
        with tempfile.TemporaryDirectory() as folder:
            save(unet, Path(folder) / "unet.safetensors")
            size = (Path(folder) / "unet.safetensors").stat().st_size
        candidates.append(Candidate(mode, unet, size))
        attach_counter(unet, candidates[-1].counter)
    return candidates


def _measure(
    pipeline, candidates: list[Candidate], prompts: list[str], args: argparse.Namespace
) -> Iterator[tuple[Tensor, dict[str, dict[str, float]]]]:
    """After each part: fp16's final latents so far, and per-layer figures by mode; the rest is added to the candidates."""
    latents, layers = [], {}
    for first in range(0, len(prompts), PROMPTS_PER_PART):
        part = prompts[first : first + PROMPTS_PER_PART]
        title = f"prompts {first + 1}-{first + len(part)} of {len(prompts)}"
        sampling = Sampling(args.steps, args.guidance, args.seed + first)
        reference = record_reference(pipeline, part, sampling, progress=_progress(f"{title}: fp16"))
        latents.append(reference.trajectory.latents)
        for candidate in candidates:
            _add(candidate, pipeline, reference, f"{title}: {candidate.mode}")
            if args.per_layer and first == 0:
                attach_counter(candidate.unet, None)  # the share is of sampling alone
                layers[candidate.mode] = layer_sqnr(pipeline.unet, candidate.unet, reference.trajectory.calls)
                attach_counter(candidate.unet, candidate.counter)
        yield torch.cat(latents), layers


def _add(candidate: Candidate, pipeline, reference: Reference, title: str) -> None:
    with unet_in_place(pipeline, candidate.unet):
        for call, answer in replay(candidate.unet, reference.trajectory, _progress(f"{title}, steps")):
            candidate.steps.add(call.step, call.output, answer)
        start = time.perf_counter()
        latents = sample_latents(pipeline, reference.prompts, reference.sampling, reference.batch_size, _progress(f"{title}, sampling"))
        candidate.seconds += time.perf_counter() - start
    candidate.sampled += len(latents)
    candidate.latents.append(latents)
    candidate.psnr += psnr_db(reference.pictures, decode_latents(pipeline, latents))


def _record(
    candidate: Candidate, reference_latents: Tensor, layers: dict[str, float] | None, args: argparse.Namespace
) -> dict[str, object]:
    fidelity = Fidelity(
        step_sqnr_db=tuple(candidate.steps.per_step_db()),
        latent_sqnr_db=sqnr_db(reference_latents, torch.cat(candidate.latents)),
        psnr_db=tuple(candidate.psnr),
        pictures=torch.empty(0),
        seconds=candidate.seconds / candidate.sampled,
        integer_share=candidate.counter.integer_share(),
    )
    per_prompt = [sqnr_db(*pair) for pair in zip(reference_latents, torch.cat(candidate.latents), strict=True)]
    record = quality_record("acceptance", MODEL_NAME, candidate.mode, fidelity, candidate.size_bytes, command_line())
    record["settings"] = {
        "prompts": candidate.sampled,
        "prompt_set": "seen and held-out in turn",
        "steps": args.steps,
        "guidance": args.guidance,
        "seed": args.seed,
    }
    record["timestep_groups"] = args.groups if candidate.mode == "w8a8-static" else None
    record["reference_size_bytes"] = UNET_FILE.stat().st_size
    record["step_sqnr_db"] = [round(value, 2) for value in fidelity.step_sqnr_db]
    record["latent_sqnr_median_db"] = sorted(per_prompt)[len(per_prompt) // 2]
    record["latent_sqnr_lowest_db"] = min(per_prompt)
    record["seconds_per_picture"] = round(fidelity.seconds, 3)
    if layers is not None:
        record["layer_sqnr_db"] = {name: round(value, 2) for name, value in layers.items()}
    return {**record, **environment()}


def _judge(records: list[dict]) -> int:
    token = next((record for record in records if record["mode"] == "w8a8-token"), None)
    failed = False
    for record in records:
        wanted = [("integer_mac_share", MIN_INTEGER_SHARE)]
        if record is token:
            wanted += [("sqnr_db", MIN_SQNR_DB), ("latent_sqnr_db", MIN_LATENT_SQNR_DB)]
        elif token is not None:
            wanted += [(key, token[key] - MAX_STATIC_LOSS_DB) for key in ("sqnr_db", "latent_sqnr_db")]
        for key, minimum in wanted:
            reached = record[key] >= minimum
            failed |= not reached
            print(f"{record['mode']}: {key} {record[key]:.3f}, at least {minimum:.3f}: {'reached' if reached else 'MISSED'}")  # noqa: T201
        print(f"{record['mode']}: worst step {record['sqnr_worst_db']:.1f} dB, PSNR {record['psnr_db']:.1f} dB")  # noqa: T201
    return int(failed)


def _progress(title: str) -> Callable[[int, int], None]:
    if not sys.stderr.isatty():
        return lambda done, total: None

    def show(done: int, total: int) -> None:
        sys.stderr.write(f"\r\033[K{title}: {done}/{total}" + ("\r\033[K" if done == total else ""))

    return show


if __name__ == "__main__":
    sys.exit(main())
