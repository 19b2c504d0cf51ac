"""Quality of every method and format against fp16 on the trained demo model, or on its variant as hard as SDXL: one row each.

    python benchmarks/quality.py [--model demo|hard] [--prompts 8] [--modes plan min-max ...] [--bits 8 6] [--adherence 1024] [--general]

SQNR is that of the UNet's output on fp16's own trajectory: energies summed over prompts per step, mean of dB over steps. Adherence
is judged on pairs of pictures of the same prompt and seed (quality_judge.py). One JSON line per row is appended to quality.jsonl in
--out; quality_table.py renders them. On a GPU give --batch 64 or more. Static scales come from 8 prompts that are not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from layer_quality import layer_sqnr
from quality_judge import Judge
from quality_layers import GroupingCache, build_unet
from quality_measure import Adherence, Candidate, Closeness, adherence, in_place, judged, measure_closeness
from quality_records import append, closeness_record, general_record
from quality_rows import ALL_MODES, CHANNEL_GROUPS, FP16, GRANULARITY, PLAN, PLAN_FLOOR, Row, build_row
from quality_sheet import write_sheet
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepquant.demo.hard_variant import harden, read_factors
from stepquant.demo.pipeline import load_demo_pipeline
from stepquant.demo.prompts import CALIBRATION, heldout_prompts, seen_prompts
from stepquant.demo.run import MODEL_NAME
from stepquant.hosts.diffusers.attention import attention_layers, set_attention
from stepquant.hosts.diffusers.calibrate import calibrate, measure_sensitivity
from stepquant.hosts.diffusers.fidelity import Reference, record_reference
from stepquant.hosts.diffusers.quantize import unet_shapes
from stepquant.hosts.diffusers.second_moments import gather_second_moments
from stepquant.hosts.diffusers.smoothing import smooth_unet
from stepquant.hosts.diffusers.trajectory import Sampling
from stepquant.hosts.key_mapping import ldm_to_diffusers
from stepquant.quant.calibration import Calibration
from stepquant.quant.grouping import Grouping, choose_groups
from stepquant.quant.layer_noise import LayerOptions
from stepquant.quant.layers import find_layers
from stepquant.quant.log2_attention import AttentionMode, AttentionScheme
from stepquant.quant.plan import Plan, make_plan, measure_options, unquantized_bytes
from stepquant.quant.plan_program import Budget
from stepquant.quant.recipe import DEFAULT_GROUPS, Recipe, preset_recipe

CALIBRATION_SEED = 10_000
SHEET_PROMPTS = 6


def main() -> int:
    """Command line of this benchmark."""
    args = _arguments()
    bench = Bench(args)
    if args.prepare:
        return 0 if args.prepare == "calibration" or bench.plan else 1
    if not args.general_only:
        bench.rows()
    if args.general or args.general_only:
        bench.general()
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("demo", "hard"), default="demo")
    parser.add_argument("--prompts", type=int, default=8, help="of SQNR, latents and PSNR")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--modes", nargs="+", choices=ALL_MODES, default=list(ALL_MODES))
    parser.add_argument("--bits", nargs="+", type=int, default=[8], help="of activations; fewer than 8 are simulated")
    parser.add_argument("--adherence", type=int, default=0, help="prompts to judge, half of them held out; at most 1024")
    parser.add_argument("--adherence-modes", nargs="+", choices=ALL_MODES, default=[PLAN])
    parser.add_argument("--verdicts", type=Path, help="on fp16's pictures, for runs side by side; made and written if it is missing")
    parser.add_argument("--general", action="store_true", help="also other samplers, steps, a resolution and prompts")
    parser.add_argument("--general-only", action="store_true")
    parser.add_argument("--general-modes", nargs="+", choices=ALL_MODES, default=["w8a8-static", "w8a8-token", PLAN])
    parser.add_argument("--smooth", action="store_true", help="smooth the UNet first; its modes get names of their own")
    parser.add_argument("--per-layer", action="store_true", help="also each layer's own SQNR, worst first")
    parser.add_argument("--in-floats", action="store_true", help="simulate integer layers too: the same to 90 dB, and fast on a CPU")
    parser.add_argument("--no-sampling", action="store_true", help="no latents and PSNR")
    parser.add_argument("--calibration", type=Path, help="made and written if it is missing")
    parser.add_argument("--moments", type=Path, help="second moments of layers' inputs; made and written if it is missing")
    parser.add_argument("--sensitivity", type=Path, help="a calibration whose sensitivities are taken instead of measured anew")
    parser.add_argument("--recipe", type=Path, help="of the plan; made and written if it is missing")
    parser.add_argument("--floor", type=float, default=50.0, help="predicted SQNR in dB of mode plan-floor, which is named after it")
    parser.add_argument("--floor-recipe", type=Path, help="of mode plan-floor; made and written if it is missing")
    parser.add_argument("--prepare", choices=("calibration", "plan"), help="only make --calibration, or --recipe too")
    parser.add_argument("--sheet", type=Path, help="JPEG of the first prompts, one column per mode")
    parser.add_argument("--sheet-modes", nargs="+", choices=ALL_MODES, default=list(ALL_MODES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


class Bench:
    """One model, its calibration and plan, and what fp16 makes of the prompts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        dtype = torch.float16 if args.device.startswith("cuda") else torch.float32
        self.pipeline = load_demo_pipeline(dtype, args.device)
        if args.model == "hard":
            # In fp32, so that the variant's weights are rounded once.
            self.pipeline.unet = harden(self.pipeline.unet.float(), read_factors()).to(dtype)
        self.model = MODEL_NAME + ("-hard" if args.model == "hard" else "")
        shapes = unet_shapes(self.pipeline.unet)
        self.layers = find_layers(shapes)
        self.other_bytes = unquantized_bytes(shapes, self.layers)
        self.calibration = self._calibration()
        self.suffix = ""
        if args.smooth:
            self.calibration, factors = smooth_unet(self.pipeline.unet, self.calibration)
            self.suffix = "-smoothed"
            _say(f"smoothed {len(factors)} sites: {', '.join(sorted(factors))}")
        self.cache, self.known = GroupingCache(), {}
        self.file = args.out / "quality.jsonl"
        args.out.mkdir(parents=True, exist_ok=True)

    def _calibration(self) -> Calibration:
        file = self.args.calibration
        if file is not None and file.exists():
            return Calibration.load(file)
        calibration = _timed("calibrating", lambda: calibrate(self.pipeline, CALIBRATION, self._sampling(), batch_size=8))
        if file is not None:
            calibration.save(file)
        return calibration

    def _sampling(self) -> Sampling:
        return Sampling(self.args.steps, self.args.guidance, CALIBRATION_SEED)

    @cached_property
    def plan(self) -> Recipe:
        """Made at its first use: probing every layer takes longer than calibrating."""
        return self._planned(self.args.recipe, Budget())

    @cached_property
    def floor_plan(self) -> Recipe:
        return self._planned(self.args.floor_recipe, Budget(sqnr_db=self.args.floor))

    def _planned(self, file: Path | None, budget: Budget) -> Recipe:
        if file is not None and file.exists():
            return Recipe.from_json(json.loads(file.read_text(encoding="utf-8")), str(file))
        if self.args.sensitivity is not None:
            self.calibration.sensitivity = Calibration.load(self.args.sensitivity).sensitivity
        if not self.calibration.sensitivity:
            measure = lambda: measure_sensitivity(self.pipeline, CALIBRATION[0], self._sampling())  # noqa: E731
            self.calibration.sensitivity = _timed("sensitivities", measure)
        plan = _timed("plan", lambda: self._make_plan(budget))
        _say("plan: " + "; ".join(plan.lines()))
        if file is not None:
            file.write_text(json.dumps(plan.recipe.to_json()), encoding="utf-8")
        return plan.recipe

    @cached_property
    def moments(self) -> dict[str, Tensor]:
        """Of the layers' inputs on the prompts that were calibrated on."""
        file = self.args.moments
        if file is not None and file.exists():
            return load_file(file, self.args.device)
        gather = lambda: gather_second_moments(self.pipeline, CALIBRATION, self._sampling(), len(CALIBRATION))  # noqa: E731
        found = _timed("second moments", gather)
        if file is not None:
            save_file(found, file)
        return found

    def weight_of(self, name: str) -> Tensor:
        return self.pipeline.unet.get_submodule(ldm_to_diffusers(name)).weight.float().cpu()

    def row(self, mode: str, bits: int) -> Row:
        plan = lambda mode: self.floor_plan if mode == PLAN_FLOOR else self.plan  # noqa: E731
        row = build_row(mode, bits, self.layers, self.calibration, plan, self.known, self.weight_of, lambda: self.moments)
        return replace(row, mode=row.mode.replace(PLAN_FLOOR, f"{PLAN}-{self.args.floor:g}"))

    @cached_property
    def _options(self) -> tuple[list[LayerOptions], Grouping]:
        grouping = choose_groups("optimal", DEFAULT_GROUPS, self.calibration, preset_recipe("w8a8-static", self.layers).schemes)
        options = measure_options(
            self.layers,
            lambda name: self.pipeline.unet.get_submodule(ldm_to_diffusers(name)).weight,
            self.calibration,
            grouping,
            channel_groups=CHANNEL_GROUPS,
            granularity=GRANULARITY,
            moments=self.moments.get,
        )
        return options, grouping

    def _make_plan(self, budget: Budget) -> Plan:
        options, grouping = self._options
        return make_plan(options, budget, grouping, self.other_bytes)

    def candidate(self, row: Row) -> Candidate:
        parts = (self.pipeline.unet, row.plans, self.calibration, row.bits, self.cache)
        unet, tap, simulated = build_unet(*parts, in_floats=self.args.in_floats)
        if row.log2_attention:
            set_attention(unet, dict.fromkeys(attention_layers(unet), AttentionScheme(AttentionMode.LOG2, row.log2_attention)))
        return Candidate(unet, tap, list(self.layers), simulated)

    def rows(self) -> None:
        """Measure every mode at every width, worst things first known: a record is written after each."""
        args = self.args
        if not args.modes:
            return
        prompts = _prompts(args.prompts)
        reference = record_reference(self.pipeline, prompts, Sampling(args.steps, args.guidance, 0), args.batch)
        judge = Judge(args.device) if args.adherence else None
        right = self._verdicts(judge) if judge else None
        if FP16 in args.modes:
            own = None if right is None else adherence(right, right, _seen(len(right)))
            append(self.file, closeness_record(self, FP16, None, own))
        columns: list[tuple[str, Tensor]] = [(FP16, reference.pictures[:SHEET_PROMPTS])]
        for bits in args.bits:
            for mode in args.modes:
                if mode == FP16 or (bits < 8 and mode.startswith("comfy")):
                    continue  # formats of their own, not widths
                try:
                    self._row(mode, bits, reference, judge, right, columns)
                except Exception:  # one format that does not run here must not cost the others
                    traceback.print_exc()
        if args.sheet and len(columns) > 1:
            write_sheet(args.sheet, self.model, prompts[:SHEET_PROMPTS], columns)

    def _row(
        self, mode: str, bits: int, reference: Reference, judge: Judge | None, right: Tensor | None, columns: list[tuple[str, Tensor]]
    ) -> None:
        start = time.perf_counter()
        row = self.row(mode, bits)
        row = replace(row, mode=row.mode + self.suffix)
        candidate = self.candidate(row)
        built = time.perf_counter() - start
        closeness = measure_closeness(self.pipeline, candidate, reference, sample=not self.args.no_sampling)
        found = None
        if judge is not None and bits == 8 and mode in self.args.adherence_modes:
            with in_place(self.pipeline, candidate):
                found = adherence(right, self._judged(judge, row.mode), _seen(len(right)))
        record = closeness_record(self, row, closeness, found, candidate.simulated)
        if self.args.per_layer:
            layers = layer_sqnr(self.pipeline.unet, candidate, reference.trajectory.calls)
            record["layer_sqnr_db"] = {name: round(value, 2) for name, value in layers.items()}
        append(self.file, record)
        if closeness.pictures is not None and mode in self.args.sheet_modes:
            columns.append((f"{row.mode}\n{closeness.steps.mean_db():.1f} dB", closeness.pictures[:SHEET_PROMPTS]))
        seconds = time.perf_counter() - start
        _say(f"{self.model} {row.mode}: {_figures(closeness, found)}; {built:.0f} of {seconds:.0f} s to build")

    def _verdicts(self, judge: Judge) -> Tensor:
        file = self.args.verdicts
        if file is not None and file.exists():
            return load_file(file)["right"]
        right = self._judged(judge, FP16)
        if file is not None:
            # Renamed when it is whole: another run may be waiting for it.
            save_file({"right": right}, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
        return right

    def _judged(self, judge: Judge, title: str) -> Tensor:
        args = self.args
        half = args.adherence // 2
        prompts = [*seen_prompts(half), *heldout_prompts(half)]
        say = lambda done, total: _say(f"{title}: {done} of {total} pictures judged") if done == total else None  # noqa: E731
        return judged(self.pipeline, judge, prompts, Sampling(args.steps, args.guidance, 0), min(args.batch * 2, 128), say)

    def general(self) -> None:
        """SQNR in every other setting; one record per setting and mode."""
        from quality_general import SETTINGS, setting_sqnr

        args = self.args
        rows = [self.row(mode, 8) for mode in args.general_modes]
        candidates = [self.candidate(row) for row in rows]
        calibrated: list[float] = []
        for setting in SETTINGS:
            prompts = heldout_prompts(args.prompts) if setting.heldout else seen_prompts(args.prompts)
            meters = setting_sqnr(self.pipeline, setting, candidates, prompts, args.guidance, 0, args.batch)
            calibrated = calibrated or [meter.mean_db() for meter in meters]
            for row, candidate, meter, base in zip(rows, candidates, meters, calibrated, strict=True):
                append(self.file, general_record(self, row, setting, meter, meter.mean_db() - base, candidate.simulated))
                _say(f"{self.model} {row.mode}, {setting.name}: {meter.mean_db():.2f} dB, {meter.mean_db() - base:+.2f}")


def _prompts(count: int) -> list[str]:
    """Trained and held-out prompts in turn."""
    pairs = zip(seen_prompts((count + 1) // 2), heldout_prompts((count + 1) // 2), strict=True)
    return [prompt for pair in pairs for prompt in pair][:count]


def _seen(count: int) -> Tensor:
    return torch.arange(count) < count // 2


def _figures(closeness: Closeness, found: Adherence | None) -> str:
    text = f"{closeness.steps.mean_db():.2f} dB, worst step {closeness.steps.worst_db():.2f}"
    if closeness.latent_sqnr_db is not None:
        text += f", latents {closeness.latent_sqnr_db:.2f}, PSNR {closeness.psnr_db:.2f}"
    text += f", integer {100 * closeness.integer_share:.1f} %"
    return text if found is None else f"{text}, adherence {found.all.mean:+.2f} [{found.all.low:+.2f}, {found.all.high:+.2f}] points"


def _timed(title: str, work):
    start = time.perf_counter()
    result = work()
    _say(f"{title}: {time.perf_counter() - start:.0f} s")
    return result


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
