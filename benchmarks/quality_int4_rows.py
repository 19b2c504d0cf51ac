"""The quality table's rows with 4-bit weights: ours by rounding, DGQ's recipe, GGUF's weight-only formats. quality_rows.py lists them.

    python benchmarks/quality_int4_rows.py --model demo|hard --calibration FILE --out FOLDER    # plan, Hessians, reconstruction
    STEPQUANT_ROUNDED=FOLDER python benchmarks/quality.py --model demo|hard --modes w4a8-best ...

Weights of 4 bits run as the int8 codes that they are exactly; GGUF's are simulated in floats. Prompts rounded on are in no row.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from quality_layers import LayerPlan
from torch import Tensor

from stepquant.demo.hard_variant import harden, read_factors
from stepquant.demo.pipeline import load_demo_pipeline
from stepquant.demo.prompts import CALIBRATION, heldout_prompts, seen_prompts
from stepquant.demo.recipe.scenes import BACKGROUNDS
from stepquant.errors import CalibrationError
from stepquant.hosts.diffusers.calibrate import measure_sensitivity
from stepquant.hosts.diffusers.hessians import gather_hessians
from stepquant.hosts.diffusers.quantize import unet_shapes
from stepquant.hosts.diffusers.reconstruct import Reconstruction, reconstruct
from stepquant.hosts.diffusers.trajectory import Sampling
from stepquant.hosts.key_mapping import ldm_to_diffusers
from stepquant.quant.calibration import Calibration
from stepquant.quant.grouping import choose_groups
from stepquant.quant.int4 import Int4Weight, int8_codes
from stepquant.quant.layer_noise import stored_bytes
from stepquant.quant.layers import LayerSpec, find_layers
from stepquant.quant.plan import Plan, make_plan, measure_options, unquantized_bytes
from stepquant.quant.plan_program import Budget
from stepquant.quant.recipe import DEFAULT_GROUPS, Recipe, preset_recipe
from stepquant.quant.rounding.block import Training
from stepquant.quant.rounding.folder import RoundedFolder
from stepquant.quant.rounding.hessian import HessianFolder
from stepquant.quant.rounding.method import Rounding, RoundingMethod
from stepquant.quant.scheme import ActivationMode, ComputeType, Scheme
from stepquant.quant.weight import SMALLEST_SCALE

FOLDER_VARIABLE = "STEPQUANT_ROUNDED"
HESSIANS, PLAN_FILE = "hessians", "plan.json"
DGQ = "w4a8-dgq"
GGUF_BLOCK = 32
TOKEN, MIXED, PLANNED = "w4a8-token", "w4a8-mixed", "plan"
# Recipe and rounding by mode.
OURS = {
    "w4a8-plain": (TOKEN, RoundingMethod.PLAIN),
    "w4a8-gptq": (TOKEN, RoundingMethod.GPTQ),
    "w4a8-mixed-plain": (MIXED, RoundingMethod.PLAIN),
    "w4a8-mixed-gptq": (MIXED, RoundingMethod.GPTQ),
    "w4a8-mixed-reconstruct": (MIXED, RoundingMethod.RECONSTRUCT),
    "w4a8-plan-plain": (PLANNED, RoundingMethod.PLAIN),
    "w4a8-plan-gptq": (PLANNED, RoundingMethod.GPTQ),
    "w4a8-best": (PLANNED, RoundingMethod.RECONSTRUCT),
}
# Of the plan's file against that of w4a8-token: 1.45 GiB, the most that full-size SDXL's may have, against 1.401.
SIZE_FACTOR = 1.035
GGUF = ("gguf-q4_0", "gguf-q8_0")
INT4_MODES = (*OURS, DGQ, *GGUF)
WEIGHT_ONLY = Scheme(activation=ActivationMode.FP16, compute=ComputeType.FP16)
WeightCodes = Callable[[str, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class WeightPlan(LayerPlan):
    """A layer whose weight is rounded in its own way. codes: name, weight -> codes that int8 holds, or floats if simulated, and their
    scales (N,). bits_per_weight: of what is stored, scales included; None for what the scheme takes."""

    codes: WeightCodes | None = None
    simulated: bool = False
    bits_per_weight: float | None = None

    def weight_codes(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.codes(name, weight)

    def stored_bytes(self, spec: LayerSpec) -> int:
        if self.bits_per_weight is None:
            return super().stored_bytes(spec)
        return int(torch.Size(spec.shape).numel() * self.bits_per_weight / 8)


def int4_plans(mode: str, layers: Mapping[str, LayerSpec], grouped: Callable[[], Mapping[str, LayerPlan]]) -> dict[str, LayerPlan]:
    """Plans of one of INT4_MODES. grouped: makes the plans of W8A8 with all layers' activations in groups."""
    if mode == DGQ:
        return dgq_plans(grouped())
    return gguf_plans(mode, layers) if mode in GGUF else our_plans(mode, layers)


def our_plans(mode: str, layers: Mapping[str, LayerSpec]) -> dict[str, LayerPlan]:
    """Plans of one of OURS."""
    kind, method = OURS[mode]
    recipe, rounding = _recipe(kind, layers), _rounding(kind, method)
    return {
        name: WeightPlan(scheme, recipe.groups_of(name), codes=_rounded_codes(rounding)) if scheme.is_int4 else LayerPlan(scheme)
        for name, scheme in recipe.schemes.items()
    }


def dgq_plans(grouped: Mapping[str, LayerPlan]) -> dict[str, LayerPlan]:
    """DGQ on SDXL-Turbo (arXiv 2501.04304): weights to nearest, asymmetric, one range per output channel; activations in groups.

    Its convolutions have 4 bits too; 8 here, as ours have: the stronger opponent. grouped: plans of all layers' activations.
    """
    return {
        name: WeightPlan(plan.scheme, plan.groups, min_max=plan.min_max, codes=_asymmetric_codes, bits_per_weight=4)
        for name, plan in grouped.items()
    }


def gguf_plans(mode: str, layers: Mapping[str, LayerSpec]) -> dict[str, LayerPlan]:
    """Weight-only: every quantizable weight in blocks of 32 as it is stored, convolutions too."""
    rounded, bits = (_q4_0, 4.5) if mode.endswith("q4_0") else (_q8_0, 8.5)  # an fp16 scale for each block
    return dict.fromkeys(layers, WeightPlan(WEIGHT_ONLY, codes=_in_blocks(rounded), simulated=True, bits_per_weight=bits))


def _recipe(kind: str, layers: Mapping[str, LayerSpec]) -> Recipe:
    if kind != PLANNED:
        return preset_recipe(kind, layers)
    file = _folder() / PLAN_FILE
    return Recipe.from_json(json.loads(file.read_text(encoding="utf-8")), str(file))


def _rounding(kind: str, method: RoundingMethod) -> Rounding:
    if method is RoundingMethod.PLAIN:
        return Rounding()
    return Rounding(method, HessianFolder(_folder() / HESSIANS).read, RoundedFolder(_folder() / kind).find)


def _folder() -> Path:
    if FOLDER_VARIABLE not in os.environ:
        raise CalibrationError(f"{FOLDER_VARIABLE} is not set; it names the folder that quality_int4_rows.py wrote. Run that first.")
    return Path(os.environ[FOLDER_VARIABLE])


def _rounded_codes(rounding: Rounding) -> WeightCodes:
    def codes(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        rounded: Int4Weight = rounding.round(weight, name)
        return int8_codes(rounded.packed(), rounded.group_scale), rounded.scale

    return codes


def _asymmetric_codes(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """4-bit codes less their zero point; of convolutions 8 bits, symmetric, (Cout, kh, kw, Cin)."""
    if weight.ndim == 4:
        scale = (weight.abs().amax((1, 2, 3)) / 127).clamp_min(SMALLEST_SCALE)
        return (weight / scale.view(-1, 1, 1, 1)).round().permute(0, 2, 3, 1).to(torch.int8).contiguous(), scale
    low, high = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
    scale = ((high - low) / 15).clamp_min(SMALLEST_SCALE)
    zero_point = (-low / scale).round()[:, None]
    codes = ((weight / scale[:, None]).round() + zero_point).clamp(0, 15) - zero_point
    return codes.to(torch.int8), scale


def _in_blocks(rounded: Callable[[Tensor], Tensor]) -> WeightCodes:
    def codes(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        values = rounded(weight.reshape(-1, GGUF_BLOCK)).view(weight.shape)
        values = values.permute(0, 2, 3, 1).contiguous() if weight.ndim == 4 else values
        return values, torch.ones(len(weight), device=weight.device)

    return codes


def _q4_0(blocks: Tensor) -> Tensor:
    """ggml's: the value of largest magnitude becomes code -8; the scale is kept in fp16, codes are made with the exact one."""
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    exact = extreme / -8
    inverse = torch.where(exact == 0, 0, 1 / exact)
    return ((blocks * inverse + 8.5).floor().clamp(0, 15) - 8) * exact.half().float()


def _q8_0(blocks: Tensor) -> Tensor:
    """ggml's: codes of -127 to 127 over the largest magnitude, the scale kept in fp16."""
    exact = blocks.abs().amax(1, keepdim=True) / 127
    inverse = torch.where(exact == 0, 0, 1 / exact)
    return (blocks * inverse).round() * exact.half().float()


def main() -> int:
    """Makes what the planned and rounded rows read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("demo", "hard"), default="demo")
    parser.add_argument("--calibration", type=Path, required=True, help="for the plan, if FOLDER has none yet, and its static layers")
    parser.add_argument("--recipes", nargs="+", choices=(TOKEN, MIXED, PLANNED), default=[MIXED, PLANNED], help="to reconstruct")
    parser.add_argument("--iterations", type=int, default=Training().iterations, help="of each block")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ[FOLDER_VARIABLE] = str(args.out)
    pipeline = open_pipeline(args.model, args.device)
    layers = find_layers(unet_shapes(pipeline.unet))
    calibration = Calibration.load(args.calibration)
    if not (args.out / PLAN_FILE).exists():
        plan = _timed("plan", lambda: _plan(pipeline, layers, calibration))
        (args.out / PLAN_FILE).write_text(json.dumps(plan.recipe.to_json()), encoding="utf-8")
    prompts = rounding_prompts()
    _timed("Hessians", lambda: gather_hessians(pipeline, prompts, args.out / HESSIANS, Sampling(steps=6), batch_size=8))
    how = Reconstruction(training=Training(args.iterations))
    for kind in args.recipes:
        work = partial(reconstruct, pipeline, _recipe(kind, layers), prompts[:24], args.out / kind, how, calibration)
        _timed(f"reconstruction, {kind}", work)
    return 0


def rounding_prompts(count: int = 40) -> list[str]:
    """Prompts that no row is measured or judged on: trained ones, each on a background that is not its own."""
    known = {*seen_prompts(512), *heldout_prompts(512)}
    things = [prompt.removesuffix(" background").rpartition(", ") for prompt in seen_prompts(512)]
    colours = list(BACKGROUNDS)
    moved = [
        f"{thing}, {colours[(colours.index(colour) + 1 + index) % len(colours)]} background"
        for index, (thing, _, colour) in enumerate(things)
        if colour in colours
    ]
    return [prompt for prompt in moved if prompt not in known][-count:]


def open_pipeline(model: str, device: str):
    """The demo model, or its hard variant: fp16 on a GPU, fp32 elsewhere."""
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    pipeline = load_demo_pipeline(dtype, device)
    if model == "hard":
        pipeline.unet = harden(pipeline.unet.float(), read_factors()).to(dtype)
    return pipeline


def _plan(pipeline, layers: Mapping[str, LayerSpec], calibration: Calibration) -> Plan:
    """The best mixture of 4 and 8 bits in a file SIZE_FACTOR as large as w4a8-token's."""
    if not calibration.sensitivity:
        calibration.sensitivity = measure_sensitivity(pipeline, CALIBRATION[0], Sampling(seed=10_000))
    other = unquantized_bytes(unet_shapes(pipeline.unet), layers)
    small = other + sum(stored_bytes(spec, _recipe(TOKEN, layers).schemes.get(name)) for name, spec in layers.items())
    grouping = choose_groups("optimal", DEFAULT_GROUPS, calibration, preset_recipe("w8a8-static", layers).schemes)
    unet = pipeline.unet
    options = measure_options(
        layers, lambda name: unet.get_submodule(ldm_to_diffusers(name)).weight.cpu(), calibration, grouping, rounding=Rounding()
    )
    return make_plan(options, Budget(size_bytes=int(SIZE_FACTOR * small)), grouping, other)


def _timed(title: str, work: Callable):
    start = time.perf_counter()
    result = work()
    print(f"{title}: {time.perf_counter() - start:.0f} s, {time.process_time():.0f} s of CPU so far", file=sys.stderr, flush=True)  # noqa: T201
    return result


if __name__ == "__main__":
    sys.exit(main())
