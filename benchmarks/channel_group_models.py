"""Channel groups on the demo model, its hard variant, and attention modes: SQNR of whole UNets. Run by channel_groups.py."""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Generator, Iterator

from torch import Tensor, nn

from stepquant.demo.hard_variant import (
    SDXL_GAP_DB,
    SITES,
    activation_sqnr_db,
    channel_absmax,
    gaps_db,
    harden,
    matched_growth,
    weight_sqnr_db,
)
from stepquant.demo.pipeline import load_demo_pipeline
from stepquant.demo.prompts import CALIBRATION, heldout_prompts
from stepquant.hosts.diffusers.attention import attention_layers, set_attention
from stepquant.hosts.diffusers.calibrate import calibrate
from stepquant.hosts.diffusers.fidelity import step_sqnr
from stepquant.hosts.diffusers.quantize import attach_counter, quantize_unet, unet_shapes
from stepquant.hosts.diffusers.trajectory import Sampling, Trajectory, record_trajectory, replay, unet_in_place
from stepquant.hosts.key_mapping import ldm_to_diffusers
from stepquant.quant.activation_choice import choose_activation, measured_recipe
from stepquant.quant.layers import find_layers
from stepquant.quant.log2_attention import AttentionMode, AttentionScheme
from stepquant.quant.mac_counter import MacCounter
from stepquant.quant.recipe import preset_recipe
from stepquant.quant.timestep import uniform_groups

DEMO_GRANULARITY = 8  # K / 8 of the demo's 64 to 512 channels is what K / 64 is of SDXL's 640 to 5120
CALIBRATION_SEED = 10_000
ROUNDS = 2  # of matching: rounding to 0 makes a layer's noise grow less than its range


def demo(args: argparse.Namespace) -> Iterator[dict]:
    """The demo model as it is."""
    pipeline = load_demo_pipeline()
    yield from _model_rows(pipeline, "demo", args)


def hard(args: argparse.Namespace) -> Iterator[dict]:
    """The hard variant: first how hard it is, then the same table."""
    pipeline = load_demo_pipeline()
    trajectory = record_trajectory(pipeline, heldout_prompts(args.prompts), Sampling(args.steps, 5.0, 0))
    absmax = channel_absmax(pipeline.unet, trajectory.calls)
    growth = dict.fromkeys(SITES, args.growth)
    if args.growth is None:
        growth = yield from _match(pipeline.unet, trajectory.calls[:1], absmax)
    variant = harden(pipeline.unet, growth, absmax)
    reference, same = trajectory.calls[0].output, next(answer for _, answer in replay(variant, Trajectory(trajectory.calls[:1])))
    error = float((same - reference).norm() / reference.norm())
    yield {"model": "hard", "growth": _rounded(growth), "fp32_relative_difference": error}
    pipeline.unet = variant
    yield from _model_rows(pipeline, "hard", args)


def _match(unet: nn.Module, calls: list, absmax: dict[str, Tensor]) -> Generator[dict, None, dict[str, float]]:
    """The growth of each site that brings its layers to SDXL's sensitivity; yields what each round measured."""
    weight, growth, variant = weight_sqnr_db(unet, calls), dict.fromkeys(SITES, 1.0), unet
    for done in range(ROUNDS + 1):
        gaps = gaps_db(variant, activation_sqnr_db(variant, calls), weight)
        yield {"model": "hard", "round": done, "growth": _rounded(growth), "gap_db": _rounded(gaps), "sdxl_gap_db": dict(SDXL_GAP_DB)}
        if done < ROUNDS:
            more = matched_growth(gaps)
            growth = {site: growth[site] * more[site] for site in growth}
            variant = harden(unet, growth, absmax)
    return growth


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}


def _model_rows(pipeline, model: str, args: argparse.Namespace) -> Iterator[dict]:
    """SQNR of the UNet's output at A8, and of the layers' outputs at A8 and A6, on prompts that were not calibrated on."""
    unet = pipeline.unet
    layers = find_layers(unet_shapes(unet))
    calibration = calibrate(pipeline, CALIBRATION[: args.calibration_prompts], Sampling(args.steps, 5.0, CALIBRATION_SEED))
    trajectory = record_trajectory(pipeline, heldout_prompts(args.prompts), Sampling(args.steps, 5.0, 0))

    def weight_of(name: str) -> Tensor:
        return unet.get_submodule(ldm_to_diffusers(name)).weight

    recipes = {mode: (preset_recipe(mode, layers), {}) for mode in ("w8a8-token", "w8a8-static")}
    for count in args.groups:
        recipes[f"measured, at most {count} groups"] = measured_recipe(calibration, weight_of, layers, count, DEMO_GRANULARITY)
    for mode, (recipe, choices) in recipes.items():
        candidate, counter = quantize_unet(copy.deepcopy(unet), recipe, calibration), MacCounter()
        attach_counter(candidate, counter)
        with unet_in_place(pipeline, candidate):
            steps = step_sqnr(candidate, trajectory)
        record = {"model": model, "mode": mode, "bits": 8, "simulated": False}
        record |= {"sqnr_db": round(steps.mean_db(), 2), "sqnr_worst_db": round(steps.worst_db(), 2)}
        record["integer_mac_share"] = round(counter.integer_share(), 4)
        if choices:
            record["modes"] = dict(Counter(choice.scheme.activation.value for choice in choices.values()))
            record["effective_groups"] = dict(Counter(choice.groups for choice in choices.values()))
            record["granularity"] = DEMO_GRANULARITY
            record["layers"] = {name: choice.groups for name, choice in choices.items() if choice.groups > 1}
        yield record
    for bits in (8, 6):
        yield {"model": model, "bits": bits, "simulated": True, **_by_kind(calibration, weight_of, layers, bits)}


def _by_kind(calibration, weight_of, layers: dict, bits: int) -> dict:
    """Median over layers of what each mode gives the layer's output, activation noise alone, by kind of layer."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in layers:
        kind = next((kind for kind in (*SDXL_GAP_DB, "in_layers.2", "out_layers.3") if name.endswith(kind)), "other")
        choice = choose_activation(name, calibration.layers[name], weight_of(name), uniform_groups(8), 16, DEMO_GRANULARITY, bits)
        for mode, value in choice.sqnr_db.items():
            found.setdefault(kind, {}).setdefault(mode, []).append(value)
    medians = {kind: {mode: round(sorted(values)[len(values) // 2], 1) for mode, values in modes.items()} for kind, modes in found.items()}
    return {"layer_sqnr_db": medians}


def attention(args: argparse.Namespace) -> Iterator[dict]:
    """Attention modes alone, all else float. The start token is marked as SDXL's is (hard_variant.py), for it is found by value."""
    pipeline = load_demo_pipeline()
    trajectory = record_trajectory(pipeline, heldout_prompts(args.prompts), Sampling(args.steps, 5.0, 0))
    schemes = {"int8 qk": AttentionScheme(AttentionMode.INT8_QK)}
    for bits in (8, 6, 4):
        schemes[f"log2 {bits} bit"] = AttentionScheme(AttentionMode.LOG2, bits)
        schemes[f"log2 {bits} bit, start token quantized"] = AttentionScheme(AttentionMode.LOG2, bits, keep_start=False)
    marked = harden(pipeline.unet, {}, channel_absmax(pipeline.unet, trajectory.calls[:1]))
    for layers in ("attn1", "attn2"):
        for mode, scheme in schemes.items():
            if layers == "attn1" and not scheme.keep_start:
                continue  # self-attention has none
            unet: nn.Module = copy.deepcopy(marked)
            set_attention(unet, {name: scheme for name in attention_layers(unet) if name.endswith(layers)})
            steps = step_sqnr(unet, trajectory)
            yield {
                "model": "demo",
                "layers": layers,
                "mode": mode,
                "sqnr_db": round(steps.mean_db(), 2),
                "sqnr_worst_db": round(steps.worst_db(), 2),
            }
