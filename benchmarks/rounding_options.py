"""What low-rank branches and QuEST's fine-tuning add to GPTQ at the same file size, on the embedded engine's own kernels.

    python benchmarks/rounding_options.py --model demo|hard --what branches quest --jobs 8 --out FOLDER [--sensitivity FILE]

SQNR is the quality table's. Plans with and without branches have the same number of bytes to spend, and layer noise with GPTQ's rounding.
The demo model's Linears are a tenth of SDXL's: ranks of 2 and 4 are there what 16 and 32 are in SDXL. One JSON line per row is
appended to rounding_options.jsonl in --out. Prompts rounded on are not measured.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from quality_int4_rows import open_pipeline, rounding_prompts
from quality_records import append
from torch import nn

from stepquant.demo.prompts import CALIBRATION, heldout_prompts, seen_prompts
from stepquant.demo.record import command_line, quality_record
from stepquant.demo.run import MODEL_NAME
from stepquant.errors import PlanError
from stepquant.hosts.diffusers.calibrate import calibrate, measure_sensitivity
from stepquant.hosts.diffusers.fidelity import step_sqnr
from stepquant.hosts.diffusers.hessians import gather_hessians
from stepquant.hosts.diffusers.quantize import quantize_unet, state_of, unet_shapes
from stepquant.hosts.diffusers.quest import Quest, quest
from stepquant.hosts.diffusers.reconstruct import sharing_copy
from stepquant.hosts.diffusers.trajectory import Sampling, Trajectory, record_trajectory
from stepquant.hosts.key_mapping import ldm_to_diffusers
from stepquant.quant.calibration import Calibration
from stepquant.quant.grouping import Grouping, choose_groups
from stepquant.quant.layer_noise import LayerOptions, stored_bytes
from stepquant.quant.layers import find_layers
from stepquant.quant.plan import make_plan, measure_options, unquantized_bytes
from stepquant.quant.plan_program import Budget
from stepquant.quant.recipe import DEFAULT_GROUPS, Recipe, preset_recipe
from stepquant.quant.rounding.folder import RoundedFolder
from stepquant.quant.rounding.hessian import HessianFolder
from stepquant.quant.rounding.method import Rounding, RoundingMethod
from stepquant.quant.tuning.training import TuningSettings

BRANCHES, QUEST = "branches", "quest"
SAMPLING = Sampling(20, 5.0, 0)
PRESETS = ("w4a8-token", "w4a8-mixed")


class Keeping(Rounding):
    """Notes what it rounded: rows run the very codes that the plan was made with."""

    def round(self, weight: torch.Tensor, layer: str, rank: int = 0):
        self.kept[layer, rank] = found = super().round(weight, layer, rank)
        return found

    kept: dict = {}  # noqa: RUF012 - of this process


def measured_part(model: str, folder: Path, ranks: Sequence[int], names: Sequence[str]) -> tuple[list[LayerOptions], Grouping]:
    """Options of some layers, in a process of its own; their codes are written to folder/rank."""
    torch.set_num_threads(1)
    unet = open_pipeline(model, "cpu").unet
    layers = {name: spec for name, spec in find_layers(unet_shapes(unet)).items() if name in names}
    calibration = Calibration.load(folder / "calibration.safetensors")
    groups = choose_groups("optimal", DEFAULT_GROUPS, calibration, preset_recipe("w8a8-static", layers).schemes)
    rounding = Keeping(RoundingMethod.GPTQ, HessianFolder(folder / "hessians").read)
    options = measure_options(layers, _weights_of(unet), calibration, groups, rounding=rounding, ranks=ranks)
    for rank in {rank for _, rank in rounding.kept}:
        kept = {name: weight for (name, own), weight in rounding.kept.items() if own == rank}
        RoundedFolder(folder / f"rank{rank}").write(names[0], kept)
    return options, groups


def rounded_part(model: str, folder: Path, names: Sequence[str]) -> None:
    """GPTQ's codes of some layers, in a process of its own, written to folder/rank0."""
    torch.set_num_threads(1)
    weight_of, rounding = (
        _weights_of(open_pipeline(model, "cpu").unet),
        Rounding(RoundingMethod.GPTQ, HessianFolder(folder / "hessians").read),
    )
    RoundedFolder(folder / "rank0").write(names[0], {name: rounding.round(weight_of(name), name) for name in names})


def _weights_of(unet: nn.Module):
    return lambda name: unet.get_submodule(ldm_to_diffusers(name)).weight


class Bench:
    """One model. folder: scratch, for what the rows share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.out / args.model
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pipeline = open_pipeline(args.model, args.device)
        shapes = unet_shapes(self.pipeline.unet)
        self.layers, self.other = find_layers(shapes), unquantized_bytes(shapes, find_layers(shapes))
        self.calibration = self._calibrated() if BRANCHES in args.what else None
        gather_hessians(self.pipeline, rounding_prompts(), self.folder / "hessians", Sampling(steps=6), batch_size=8)
        self._say("calibrated")
        if BRANCHES in args.what:
            self.options, self.groups = self._options()
        else:
            names = [name for name, scheme in preset_recipe(PRESETS[0], self.layers).schemes.items() if scheme.is_int4]
            self._in_parts(rounded_part, names)
        self._say("layers rounded")
        prompts = heldout_prompts(args.prompts // 2) + seen_prompts(args.prompts - args.prompts // 2)
        self.reference: Trajectory = record_trajectory(self.pipeline, prompts, SAMPLING, args.prompts)

    def size(self, recipe: Recipe) -> int:
        return self.other + sum(stored_bytes(spec, recipe.schemes.get(name)) for name, spec in self.layers.items())

    def plan(self, factor: float, ranks: Sequence[int]) -> Recipe | None:
        """The best within so many times w4a8-token's bytes; branches of these ranks. None if nothing fits."""
        allowed = {0, *ranks}
        options = [
            replace(one, options=tuple(o for o in one.options if o.scheme is None or o.scheme.rank in allowed)) for one in self.options
        ]
        budget = Budget(size_bytes=int(factor * self.size(preset_recipe(PRESETS[0], self.layers))))
        try:
            return make_plan(options, budget, self.groups, self.other).recipe
        except PlanError:
            return None

    def codes(self, recipe: Recipe) -> Rounding:
        """GPTQ's codes, with the recipe's branches."""
        folders = {rank: RoundedFolder(self.folder / f"rank{rank}") for rank in (0, *self.args.ranks)}
        find = lambda name, shape: folders[recipe.schemes[name].rank].find(name, shape)  # noqa: E731
        return Rounding(RoundingMethod.RECONSTRUCT, rounded=find)

    def row(self, mode: str, recipe: Recipe, rounding: Rounding, **facts: object) -> None:
        unet = quantize_unet(sharing_copy(self.pipeline.unet), recipe, self.calibration, rounding)
        state_of(unet).tap.follow(self.pipeline.scheduler)
        found = step_sqnr(unet, self.reference)
        ranks = [scheme.rank for scheme in recipe.schemes.values() if scheme.rank]
        record = quality_record(
            "rounding_options", MODEL_NAME + ("-hard" if self.args.model == "hard" else ""), mode, None, self.size(recipe), command_line()
        )
        record["commit"] = record["commit"] or os.environ.get("STEPQUANT_COMMIT")
        record |= {"sqnr_db": round(found.mean_db(), 2), "sqnr_worst_db": round(found.worst_db(), 2), "branches": len(ranks)}
        record |= {"ranks": {str(rank): ranks.count(rank) for rank in sorted(set(ranks))}, "prompts": self.args.prompts, **facts}
        append(self.args.out / "rounding_options.jsonl", record)
        figures = f"{record['sqnr_db']:.2f} dB, worst {record['sqnr_worst_db']:.2f}, {record['size_bytes']} bytes"
        self._say(f"{mode}: {figures}, ranks {record['ranks']}")

    def quest_row(self, mode: str, recipe: Recipe, training: TuningSettings) -> None:
        how = Quest(calls=self.args.calls, batch_size=4, training=training, exact=False)
        start = time.perf_counter()
        files = quest(
            self.pipeline,
            recipe,
            rounding_prompts(),
            self.folder / f"quest-{training.learning_rate}",
            how,
            self.codes(recipe),
            self.calibration,
        )
        seconds = round(time.perf_counter() - start)
        self.row(
            mode,
            recipe,
            Rounding(RoundingMethod.QUEST, rounded=files.find),
            seconds=seconds,
            steps=training.steps,
            rate=training.learning_rate,
        )

    def _calibrated(self) -> Calibration:
        found = calibrate(self.pipeline, CALIBRATION, replace(SAMPLING, seed=10_000), len(CALIBRATION))
        if self.args.sensitivity:
            found.sensitivity = Calibration.load(self.args.sensitivity).sensitivity
        else:
            found.sensitivity = measure_sensitivity(self.pipeline, CALIBRATION[0], replace(SAMPLING, seed=10_000))
        found.save(self.folder / "calibration.safetensors")
        return found

    def _options(self) -> tuple[list[LayerOptions], Grouping]:
        found = self._in_parts(measured_part, list(self.layers), self.args.ranks)
        by_name = {one.name: one for options, _ in found for one in options}
        own: Mapping = {name: groups for _, grouping in found for name, groups in grouping.layer_groups.items()}
        return [by_name[name] for name in self.layers if name in by_name], replace(found[0][1], layer_groups=own)

    def _in_parts(self, work, names: list[str], *given: object) -> list:
        """Each process takes every so many-th layer: neighbours are alike, and take as long."""
        jobs = self.args.jobs
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(partial(work, self.args.model, self.folder, *given), [names[index::jobs] for index in range(jobs)]))

    def _say(self, text: str) -> None:
        print(f"{self.args.model}, {time.perf_counter() - START:.0f} s: {text}", flush=True)  # noqa: T201


START = time.perf_counter()


def main() -> int:
    """Rows of the presets, then those asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("demo", "hard"), default="demo")
    parser.add_argument("--what", nargs="+", choices=(BRANCHES, QUEST), default=[BRANCHES, QUEST])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--sizes", type=float, nargs="+", default=[1.0, 1.035, 1.07, 1.15], help="files, times w4a8-token's")
    parser.add_argument("--steps", type=int, default=Quest().training.steps, help="of QuEST")
    parser.add_argument("--rates", type=float, nargs="+", default=[Quest().training.learning_rate], help="of QuEST")
    parser.add_argument("--calls", type=int, default=4, help="UNet calls that QuEST keeps of each batch")
    parser.add_argument("--sensitivity", type=Path, help="calibration whose sensitivities to take; measured if left out")
    parser.add_argument("--jobs", type=int, default=2, help="processes that measure layers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    bench = Bench(args)
    presets = {name: preset_recipe(name, bench.layers) for name in PRESETS}
    for name, recipe in presets.items():
        bench.row(f"{name}-plain", recipe, Rounding())
        bench.row(f"{name}-gptq", recipe, bench.codes(recipe))
    if BRANCHES in args.what:
        for factor in args.sizes:
            for suffix, ranks in (("", ()), ("-branches", args.ranks)):
                recipe = bench.plan(factor, ranks)
                if recipe is not None:
                    bench.row(f"plan-{factor}-gptq{suffix}", recipe, bench.codes(recipe))
    if QUEST in args.what:
        for rate in args.rates:
            training = replace(Quest().training, steps=args.steps, learning_rate=rate)
            bench.quest_row("w4a8-mixed-quest", presets[PRESETS[1]], training)
    return 0


if __name__ == "__main__":
    sys.exit(main())
