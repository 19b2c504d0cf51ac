"""Scale tuning on the demo model with 4-bit weights: a new subject from 5 pictures, and repair; before and after.

    python benchmarks/scale_tuning.py subject [--steps 300] [--experts 1] [--adherence 64] [--device cpu] [--out benchmarks/results]
    python benchmarks/scale_tuning.py repair  [--steps 200] [--experts 2] [--model demo]

One JSON line is appended to scale_tuning.jsonl, and with `subject` scale_tuning_subject.jpg is written. The subject's distance is measured
on backgrounds that were not trained, against real pictures that were not trained; adherence on prompts of other things.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from quality_judge import Judge, paired_difference
from scale_subject import HELD_OUT, PROMPT, SubjectJudge, draw_pictures, right_backgrounds
from torch import Tensor, nn

from stepquant.demo.hard_variant import harden, read_factors
from stepquant.demo.pipeline import load_demo_pipeline
from stepquant.demo.prompts import CALIBRATION, SHOWN, heldout_prompts, seen_prompts
from stepquant.demo.record import command_line, environment, quality_record
from stepquant.demo.run import MODEL_NAME, to_image
from stepquant.demo.sheet import Column, Row, draw_sheet
from stepquant.hosts.diffusers.fidelity import step_sqnr
from stepquant.hosts.diffusers.quantize import quantize_unet, unet_shapes
from stepquant.hosts.diffusers.trajectory import Sampling, Trajectory, decode_latents, record_trajectory, sample_latents, unet_in_place
from stepquant.hosts.diffusers.tune import encode_examples, tune
from stepquant.hosts.diffusers.tune_layers import scaled
from stepquant.hosts.diffusers.unet_file import save
from stepquant.quant.layers import find_layers
from stepquant.quant.recipe import preset_recipe
from stepquant.quant.sqnr import sqnr_db
from stepquant.quant.tuning.scale_file import load_scale_set, save_scale_set
from stepquant.quant.tuning.scale_set import ScaleSet
from stepquant.quant.tuning.training import REPAIR_RATE, SUBJECT_RATE, TuningSettings
from stepquant.version import VERSION

SEED = 1000  # of what is judged; nothing is trained on it


def main() -> None:
    """Command line of this benchmark."""
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    # fp32 on a GPU too: as diffusers trains, and what is compared does not depend on the device.
    pipeline = load_demo_pipeline(device=args.device)
    if args.model == "hard":
        pipeline.unet = harden(pipeline.unet, read_factors())
    recipe = preset_recipe(args.preset, find_layers(unet_shapes(pipeline.unet)))
    unet = quantize_unet(copy.deepcopy(pipeline.unet), recipe)
    model_bytes = _saved_bytes(args.out, lambda path: save(unet, path))
    rate = args.learning_rate or (SUBJECT_RATE if args.what == "subject" else REPAIR_RATE)
    settings = TuningSettings(args.steps, rate, args.batch, args.experts, args.prior_weight)
    figures = (_subject if args.what == "subject" else _repair)(pipeline, unet, settings, args)
    model = MODEL_NAME if args.model == "demo" else f"{MODEL_NAME}-hard"
    record = quality_record(f"scale_tuning_{args.what}", model, args.preset, None, model_bytes, command_line())
    record["commit"] = record["commit"] or os.environ.get("STEPQUANT_COMMIT")
    record |= figures | {"file_share": figures["file_bytes"] / model_bytes, "settings": vars(settings), "device": args.device}
    with (args.out / "scale_tuning.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record | environment()) + "\n")
    print(json.dumps(figures | {"file_share": record["file_share"]}, indent=2))  # noqa: T201


def _subject(pipeline, unet: nn.Module, settings: TuningSettings, args: argparse.Namespace) -> dict[str, object]:
    pictures = draw_pictures()
    examples = encode_examples(pipeline, pictures.trained, pictures.prompts)
    reference = _reference(pipeline, args)
    scales, seconds = _timed(lambda: tune(pipeline, unet, examples, reference, settings, progress=_say))
    scales, size = _through_a_file(scales, args.out)
    judge = SubjectJudge(pictures, args.device)
    prompts = [PROMPT.format(word) for word in HELD_OUT for _ in range(args.pictures)]
    words = [word for word in HELD_OUT for _ in range(args.pictures)]
    asked = [
        *heldout_prompts(args.adherence // 2 + 64)[64:][: args.adherence // 2],
        *seen_prompts(args.adherence // 2 + 64)[64:][: args.adherence // 2],
    ]
    adherence = Judge(args.device)
    found, sheet = {}, []
    for name, scale_set in (("fp16", None), ("before", None), ("after", scales)):
        own = pipeline.unet if name == "fp16" else unet
        made = _sampled(pipeline, own, scale_set, prompts, args)
        right = adherence.adheres(_sampled(pipeline, own, scale_set, asked, args), asked)
        found[name] = (judge.distance(made), right_backgrounds(made, words), right)
        sheet.append((Column(name, f"distance {found[name][0]:.3f}"), made[:: args.pictures]))
    sheet.append((Column("real", "not trained"), pictures.held_out[:: len(pictures.held_out) // len(HELD_OUT)]))
    _draw_sheet(args.out / "scale_tuning_subject.jpg", prompts[:: args.pictures], sheet)
    change = paired_difference(found["before"][2], found["after"][2])
    encoded = decode_latents(pipeline, examples.latents)
    return {
        "distance": {name: round(distance, 4) for name, (distance, _, _) in found.items()},
        "distance_floor": {"real": round(judge.floor(), 4), "trained_through_vae": round(judge.distance(encoded), 4)},
        "distance_ratio": round(found["after"][0] / found["before"][0], 4),
        "backgrounds_percent": {name: background for name, (_, background, _) in found.items()},
        "adherence_percent": {name: 100 * float(right.double().mean()) for name, (_, _, right) in found.items()},
        "adherence_diff": round(change.mean, 3),
        "ci_low": round(change.low, 3),
        "ci_high": round(change.high, 3),
        "judged": len(asked),
        "file_bytes": size,
        "seconds": round(seconds, 1),
    }


def _repair(pipeline, unet: nn.Module, settings: TuningSettings, args: argparse.Namespace) -> dict[str, object]:
    reference = _reference(pipeline, args)
    test = record_trajectory(pipeline, SHOWN, Sampling(20, seed=SEED), 2)
    scales, seconds = _timed(lambda: tune(pipeline, unet, None, reference, settings, progress=_say))
    scales, size = _through_a_file(scales, args.out)
    figures: dict[str, object] = {"file_bytes": size, "seconds": round(seconds, 1), "prompts": len(SHOWN)}
    for name, scale_set in (("before", None), ("after", scales)):
        with _running(unet, scale_set), unet_in_place(pipeline, unet):
            steps = step_sqnr(unet, test)
            latents = sample_latents(pipeline, SHOWN, Sampling(20, seed=SEED), 2)
        figures[f"sqnr_{name}_db"], figures[f"sqnr_worst_{name}_db"] = round(steps.mean_db(), 3), round(steps.worst_db(), 3)
        figures[f"latent_sqnr_{name}_db"] = round(sqnr_db(test.latents, latents), 3)
    return figures


def _draw_sheet(file: Path, prompts: list[str], columns: list[tuple[Column, Tensor]]) -> None:
    rows = [Row(prompt, [to_image(made[index].cpu()) for _, made in columns], [""] * len(columns)) for index, prompt in enumerate(prompts)]
    subtitle = "4-bit weights before and after 5 pictures of the subject, on backgrounds that were not trained. Same seeds."
    draw_sheet(MODEL_NAME, subtitle, [column for column, _ in columns], rows).save(file, quality=85)


def _reference(pipeline, args: argparse.Namespace) -> Trajectory:
    """fp16's answers on prompts of other things."""
    prompts = [*CALIBRATION, *seen_prompts(args.prior_prompts)][: args.prior_prompts]
    return record_trajectory(pipeline, prompts, Sampling(args.sampling_steps), args.prior_batch)


def _sampled(pipeline, unet: nn.Module, scales: ScaleSet | None, prompts: list[str], args: argparse.Namespace) -> Tensor:
    with _running(unet, scales), unet_in_place(pipeline, unet):
        return decode_latents(pipeline, sample_latents(pipeline, prompts, Sampling(args.sampling_steps, seed=SEED), args.sampling_batch))


def _running(unet: nn.Module, scales: ScaleSet | None):
    return torch.no_grad() if scales is None else scaled(unet, scales)


def _through_a_file(scales: ScaleSet, folder: Path) -> tuple[ScaleSet, int]:
    """What an artist would load: with the file's rounding."""
    path = folder / "scale_tuning.safetensors"
    save_scale_set(scales, path, VERSION)
    return load_scale_set(path), path.stat().st_size


def _saved_bytes(folder: Path, write: Callable[[Path], None]) -> int:
    path = folder / "scale_tuning_model.safetensors"
    write(path)
    size = path.stat().st_size
    path.unlink()
    return size


def _timed(work: Callable[[], ScaleSet]) -> tuple[ScaleSet, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _say(done: int, total: int, loss: float) -> None:
    if done % 10 == 0:
        print(f"step {done} of {total}, loss {loss:.5f}", file=sys.stderr, flush=True)  # noqa: T201


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("subject", "repair"))
    parser.add_argument("--model", choices=("demo", "hard"), default="demo")
    parser.add_argument("--preset", default="w4a8-token")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--experts", type=int, default=1)
    parser.add_argument("--prior-weight", type=float, default=1.0)
    parser.add_argument("--prior-prompts", type=int, default=16, help="of other things, whose answers are to stay")
    parser.add_argument("--prior-batch", type=int, default=1, help="prompts in one recorded call")
    parser.add_argument("--pictures", type=int, default=2, help="judged ones on each held-out background")
    parser.add_argument("--adherence", type=int, default=64, help="prompts of other things that are judged")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--sampling-batch", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
