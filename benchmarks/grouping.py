"""Timestep grouping methods against each other on the demo model, at 8 and at 6 bits of activations. Judges no pictures.

    python benchmarks/grouping.py [--prompts 4] [--steps 20] [--counts 1 2 4 8 16] [--bits 8 6] [--out benchmarks/results]

SQNR is that of the UNet's output on fp16's own trajectory: energies summed over prompts per step, mean of dB over steps. Weights have
8 bits; inputs are rounded in floats, at 6 bits because no kernel has them, at 8 bits to compare like with like
(--check also runs one 8-bit setting on integer codes). Layers with a scale per row keep it. One JSON line per setting.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from simulated_unet import SimulatedUNet, plain_min_max

from stepquant.demo.pipeline import load_demo_pipeline
from stepquant.demo.prompts import CALIBRATION, heldout_prompts, seen_prompts
from stepquant.demo.record import command_line, environment, quality_record
from stepquant.demo.run import MODEL_NAME
from stepquant.hosts.diffusers.calibrate import calibrate
from stepquant.hosts.diffusers.fidelity import step_sqnr
from stepquant.hosts.diffusers.quantize import quantize_unet, unet_shapes
from stepquant.hosts.diffusers.trajectory import Sampling, record_trajectory
from stepquant.quant.calibration import ActivationTables, Calibration
from stepquant.quant.group_search import search_groups
from stepquant.quant.grouping import SEARCH_VALUES, Grouping, choose_groups
from stepquant.quant.layers import find_layers
from stepquant.quant.range_error import bucket_values
from stepquant.quant.recipe import Recipe, preset_recipe
from stepquant.quant.scheme import Scheme
from stepquant.quant.timestep import NUM_BUCKETS, spread_groups

CALIBRATION_SEED = 10_000
METHODS = ("uniform", "optimal", "optimal-shared", "search", "search-expected", "curve")


def main() -> None:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--calibration", type=Path, help="reuse a calibration of the demo model instead of making one")
    parser.add_argument("--skip-anchors", action="store_true", help="leave out dynamic scales and plain min-max")
    parser.add_argument("--check", action="store_true", help="also run uniform groups of 8 on integer codes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    pipeline = load_demo_pipeline()
    sampling = Sampling(args.steps, 5.0, CALIBRATION_SEED)
    calibration = Calibration.load(args.calibration) if args.calibration else calibrate(pipeline, CALIBRATION, sampling)
    half = (args.prompts + 1) // 2
    prompts = [*seen_prompts(half), *heldout_prompts(half)][: args.prompts]
    trajectory = record_trajectory(pipeline, prompts, Sampling(args.steps, 5.0, 0))
    layers = find_layers(unet_shapes(pipeline.unet))
    recipe = preset_recipe("w8a8-static", layers)
    static = {name: scheme for name, scheme in recipe.schemes.items() if scheme.is_static}
    simulated = SimulatedUNet(pipeline.unet, list(layers))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "grouping.jsonl").open("a", encoding="utf-8") as file:
        for method, count, bits, tables, seconds in _settings(calibration, static, args):
            simulated.tables, simulated.bits = tables, bits
            meter = step_sqnr(simulated.unet, trajectory)
            _write(file, _record(method, count, bits, meter, seconds, args, simulated=True))
        if args.check:
            unet = quantize_unet(copy.deepcopy(pipeline.unet), recipe, calibration)
            _write(file, _record("uniform", 8, 8, step_sqnr(unet, trajectory), 0.0, args, simulated=False))


def _settings(
    calibration: Calibration, static: dict[str, Scheme], args: argparse.Namespace
) -> Iterator[tuple[str, int, int, dict[str, ActivationTables], float]]:
    """Method, count, bits, tables by layer, and the seconds it took to choose the groups. Groups are chosen at 8 bits."""
    for bits in [] if args.skip_anchors else args.bits:
        yield "token", 0, bits, {}, 0.0
        yield "min-max", 1, bits, {name: _min_max(calibration, name, scheme, bits) for name, scheme in static.items()}, 0.0
    for method in args.methods:
        for count in args.counts:
            if count == 1 and method != "uniform":
                continue  # one group is one group
            start = time.perf_counter()
            grouping = _choose(method, count, calibration, static)
            seconds = time.perf_counter() - start
            for bits in args.bits:
                yield method, count, bits, _tables(grouping, calibration, static, bits), seconds


def _choose(method: str, count: int, calibration: Calibration, static: dict[str, Scheme]) -> Grouping:
    if method == "optimal-shared":
        return choose_groups("optimal", count, calibration, static, shared=True)
    if method != "search-expected":
        return choose_groups(method, count, calibration, static)
    own = {}
    for name, scheme in static.items():
        values = bucket_values(calibration.layers[name], SEARCH_VALUES)
        found = search_groups([values], [scheme.symmetric], count, expected_error=True)
        own[name] = spread_groups(values.buckets.tolist(), found.groups)
    return Grouping(choose_groups("search", 1, calibration, {}).method, count, tuple(range(NUM_BUCKETS)), own)


def _tables(grouping: Grouping, calibration: Calibration, static: dict[str, Scheme], bits: int) -> dict[str, ActivationTables]:
    points = grouping.count if grouping.method.value == "curve" else 0
    recipe = Recipe(static, "", "", grouping.groups, grouping.layer_groups, grouping.method.value, points)
    return {name: calibration.tables(name, scheme, recipe.groups_of(name), bits) for name, scheme in static.items()}


def _min_max(calibration: Calibration, name: str, scheme: Scheme, bits: int) -> ActivationTables:
    statistics = calibration.layers[name]
    return plain_min_max(float(statistics.range_min.min()), float(statistics.range_max.max()), scheme.symmetric, bits)


def _record(method: str, count: int, bits: int, meter, seconds: float, args: argparse.Namespace, simulated: bool) -> dict[str, object]:
    mode = f"w8a{bits}-{method}" + (f"-{count}" if count else "")
    return {
        **quality_record("grouping", MODEL_NAME, mode, None, 0, command_line()),
        "method": method,
        "groups": count,
        "activation_bits": bits,
        "simulated": simulated,
        "sqnr_db": round(meter.mean_db(), 3),
        "sqnr_worst_db": round(meter.worst_db(), 3),
        "step_sqnr_db": [round(value, 2) for value in meter.per_step_db()],
        "seconds_to_choose": round(seconds, 2),
        "settings": {"prompts": args.prompts, "steps": args.steps, "guidance": 5.0, "calibration_prompts": len(CALIBRATION)},
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **environment(),
    }


def _write(file, record: dict[str, object]) -> None:
    """After every setting, so that a run cut short leaves what it measured."""
    file.write(json.dumps(record) + "\n")
    file.flush()
    print(f"{record['mode']}: {record['sqnr_db']:.2f} dB, worst step {record['sqnr_worst_db']:.2f} dB", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    main()
