"""Plans on the demo model: predicted against measured SQNR of the whole UNet, and the time that calibrating took.

    python benchmarks/plan_prediction.py [--prompts 4] [--steps 20] [--calibration FILE] [--out benchmarks/results]

Measured: the UNet's output on fp16's own trajectory, integer codes, energies summed over prompts per step, mean of dB over steps.
Three plans and the two presets; one JSON line each. Exit code 1 if a prediction is further off than 3 dB.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path

from stepquant.demo.pipeline import load_demo_pipeline
from stepquant.demo.prompts import CALIBRATION, heldout_prompts, seen_prompts
from stepquant.demo.record import command_line, environment, quality_record
from stepquant.demo.run import MODEL_NAME
from stepquant.hosts.diffusers.calibrate import calibrate, measure_sensitivity
from stepquant.hosts.diffusers.fidelity import step_sqnr
from stepquant.hosts.diffusers.quantize import quantize_unet, unet_shapes
from stepquant.hosts.diffusers.trajectory import Sampling, record_trajectory
from stepquant.hosts.key_mapping import ldm_to_diffusers
from stepquant.quant.calibration import Calibration
from stepquant.quant.grouping import choose_groups
from stepquant.quant.layers import find_layers
from stepquant.quant.plan import Plan, make_plan, measure_options, uniform_plan, unquantized_bytes
from stepquant.quant.plan_program import Budget
from stepquant.quant.recipe import preset_recipe

CALIBRATION_SEED = 10_000
MOST_OFF_DB = 3.0


def main() -> int:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--calibration", type=Path, help="reuse one of the demo model, with sensitivities")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    pipeline = load_demo_pipeline()
    calibration, seconds = _calibration(pipeline, args)
    half = (args.prompts + 1) // 2
    prompts = [*seen_prompts(half), *heldout_prompts(half)][: args.prompts]
    trajectory = record_trajectory(pipeline, prompts, Sampling(args.steps, 5.0, 0))
    args.out.mkdir(parents=True, exist_ok=True)
    worst = 0.0
    with (args.out / "plan_prediction.jsonl").open("a", encoding="utf-8") as file:
        for mode, plan in _plans(pipeline, calibration).items():
            meter = step_sqnr(quantize_unet(copy.deepcopy(pipeline.unet), plan.recipe, calibration), trajectory)
            worst = max(worst, abs(plan.mean_db - meter.mean_db()))
            record = _record(mode, plan, meter, seconds, args)
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(f"{mode}: predicted {plan.mean_db:.2f} dB, measured {meter.mean_db():.2f} dB", file=sys.stderr)  # noqa: T201
    return int(worst > MOST_OFF_DB)


def _calibration(pipeline, args: argparse.Namespace) -> tuple[Calibration, dict[str, float]]:
    if args.calibration:
        return Calibration.load(args.calibration), {}
    sampling = Sampling(args.steps, 5.0, CALIBRATION_SEED)
    start = time.perf_counter()
    calibration = calibrate(pipeline, CALIBRATION, sampling)
    middle = time.perf_counter()
    calibration.sensitivity = measure_sensitivity(pipeline, CALIBRATION[0], sampling)
    return calibration, {"calibrate_seconds": round(middle - start, 1), "sensitivity_seconds": round(time.perf_counter() - middle, 1)}


def _plans(pipeline, calibration: Calibration) -> dict[str, Plan]:
    shapes = unet_shapes(pipeline.unet)
    layers = find_layers(shapes)
    other = unquantized_bytes(shapes, layers)
    grouping = choose_groups("optimal", 8, calibration, preset_recipe("w8a8-static", layers).schemes)
    options = measure_options(layers, lambda name: pipeline.unet.get_submodule(ldm_to_diffusers(name)).weight, calibration, grouping)
    full = make_plan(options, Budget(integer_share=1.0), grouping, other)
    return {
        "plan": make_plan(options, Budget(), grouping, other),
        "plan-100-integer": full,
        "plan-1-db-less": make_plan(options, Budget(sqnr_db=full.mean_db - 1, integer_share=1.0), grouping, other),
        "token": uniform_plan(options, "token", grouping, other),
        "static": uniform_plan(options, "static", grouping, other),
    }


def _record(mode: str, plan: Plan, meter, seconds: dict[str, float], args: argparse.Namespace) -> dict[str, object]:
    return {
        **quality_record("plan_prediction", MODEL_NAME, mode, None, plan.size_bytes, command_line()),
        "sqnr_db": round(meter.mean_db(), 3),
        "sqnr_worst_db": round(meter.worst_db(), 3),
        "predicted_sqnr_db": round(plan.mean_db, 3),
        "integer_mac_share": round(plan.integer_share, 4),
        "schemes": {label: list(plan.choices.values()).count(label) for label in sorted(set(plan.choices.values()))},
        "settings": {"prompts": args.prompts, "steps": args.steps, "guidance": 5.0, "calibration_prompts": len(CALIBRATION)},
        **seconds,
        **environment(),
    }


if __name__ == "__main__":
    sys.exit(main())
