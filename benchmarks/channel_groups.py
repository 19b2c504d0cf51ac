"""Channel groups against token and static scales: SQNR on single layers of SDXL's widths and on the demo model; time on a GPU.

    python benchmarks/channel_groups.py [--part layers demo hard attention speed] [--prompts 4] [--steps 10]

JSON lines are appended to benchmarks/results/channel_groups.jsonl. 6 bits are simulated: int8 kernels have no 6-bit codes.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import torch
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
from stepquant.demo.record import command_line, environment
from stepquant.hosts.diffusers.attention import attention_layers, set_attention
from stepquant.hosts.diffusers.calibrate import calibrate
from stepquant.hosts.diffusers.fidelity import step_sqnr
from stepquant.hosts.diffusers.quantize import attach_counter, quantize_unet, unet_shapes
from stepquant.hosts.diffusers.trajectory import Sampling, Trajectory, record_trajectory, replay, unet_in_place
from stepquant.hosts.key_mapping import ldm_to_diffusers
from stepquant.kernels import dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.quant.activation_choice import choose_activation, choose_grouping, measured_recipe
from stepquant.quant.activation_noise import output_sqnr_db, simulated_rows
from stepquant.quant.kmeans_groups import kmeans_groups
from stepquant.quant.layers import find_layers
from stepquant.quant.log2_attention import AttentionMode, AttentionScheme
from stepquant.quant.mac_counter import MacCounter
from stepquant.quant.observer import LayerObserver, LayerStatistics
from stepquant.quant.recipe import preset_recipe
from stepquant.quant.scheme import ActivationMode, Scheme
from stepquant.quant.timestep import uniform_groups

OUT = Path(__file__).parent / "results" / "channel_groups.jsonl"
PARTS = ("layers", "demo", "hard", "attention", "speed")
GROUP_COUNTS = (1, 2, 4, 8, 16)
# (name, K, N, taps): SDXL's Linears and the convolution of its deep level
WIDTHS = [("to_q", 640, 640, 1), ("to_q", 1280, 1280, 1), ("ff.net.2", 5120, 1280, 1), ("conv", 1280, 1280, 3)]
# 13 of 1280 channels stand out (research on SDXL's Linears; MixDQ's figures for ff.net.2 and the start token are of this size).
OUTLIER_SHARE, OUTLIER_FACTORS = 0.01, (10.0, 30.0)
ROWS = 256
DEMO_GRANULARITY = 8  # K / 8 of the demo's 64 to 512 channels is what K / 64 is of SDXL's 640 to 5120
CALIBRATION_SEED = 10_000
ROUNDS = 2  # of matching: rounding to 0 makes a layer's noise grow less than its range


def main() -> int:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS[:4]))
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--groups", type=int, nargs="+", default=list(GROUP_COUNTS), help="most channel groups of the measured recipes")
    parser.add_argument("--growth", type=float, help="hard: widen every range by this instead of matching SDXL's sensitivity")
    parser.add_argument("--calibration-prompts", type=int, default=6)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    runs = {"layers": single_layers, "demo": demo, "hard": hard, "attention": attention, "speed": speed}
    with args.out.open("a", encoding="utf-8") as file:
        for part in args.part:
            for record in runs[part](args):
                sys.stdout.write(json.dumps(record) + "\n")
                line = {"kind": f"channel_groups {part}", **record, **environment(), "command": command_line()}
                file.write(json.dumps(line) + "\n")
                file.flush()
    return 0


def single_layers(args: argparse.Namespace) -> Iterator[dict]:
    """Synthetic inputs with outlier channels whose size drifts from row to row, as it does over timesteps and tokens."""
    generator = torch.Generator().manual_seed(0)
    for name, K, N, taps in WIDTHS:
        for factor in OUTLIER_FACTORS:
            x = torch.randn(ROWS, K, generator=generator)
            outliers = torch.randperm(K, generator=generator)[: round(OUTLIER_SHARE * K)]
            x[:, outliers] *= factor
            x *= torch.exp(torch.randn(ROWS, 1, generator=generator) / 4)
            weight = torch.randn((N, K) if taps == 1 else (N // 4, K, taps, taps), generator=generator) / K**0.5
            for bits in (8, 6):
                shape = {"layer": name, "K": K, "outlier_factor": factor, "bits": bits, "simulated": bits < 8}
                yield from ({**shape, **row} for row in _layer_rows(_observed(x), weight, bits))


def _observed(x: Tensor) -> LayerStatistics:
    observer = LayerObserver(x.shape[1])
    for part in x.split(16):
        observer.update(part[None], [20])
    return observer.statistics()


def _layer_rows(statistics: LayerStatistics, weight: Tensor, bits: int) -> Iterator[dict]:
    groups, rows, is_conv = uniform_groups(1), statistics.rows.float(), weight.ndim == 4

    def row(mode: str, noisy: Tensor, count: int = 1, effective: int = 1, granularity: int = 0) -> dict:
        sqnr = round(output_sqnr_db(rows, noisy, weight), 2)
        return {"mode": mode, "groups": count, "effective_groups": effective, "granularity": granularity, "sqnr_db": sqnr}

    for mode in (ActivationMode.TOKEN, ActivationMode.STATIC):
        yield row(mode.value, simulated_rows(statistics, Scheme(activation=mode), groups, is_conv=is_conv, bits=bits))
    for count in GROUP_COUNTS[1:]:
        found = kmeans_groups(statistics.range_min[0], statistics.range_max[0], count)
        yield row("paper's k-means, static", found.quantized(rows, bits), count, len(found.low), 1)
        for granularity in (64, 8):
            if count > weight.shape[1] // granularity:
                continue
            for base in (ActivationMode.TOKEN, ActivationMode.STATIC):
                scheme = Scheme(activation=ActivationMode.CHANNEL_GROUP, channel_groups=count, granularity=granularity, group_base=base)
                grouping = choose_grouping("layer", statistics, weight, scheme, groups, is_conv, bits)
                noisy = simulated_rows(statistics, scheme, groups, is_conv=is_conv, bits=bits, grouping=grouping)
                yield row(f"channel_group on {base.value}", noisy, count, grouping.groups, granularity)


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


def speed(args: argparse.Namespace) -> Iterator[dict]:
    """What channel groups cost the product and the quantization on this GPU: medians, int8 without groups beside it."""
    from triton.testing import do_bench

    for M, N, K in [(2048, 1280, 1280), (2048, 10240, 1280), (2048, 1280, 5120), (8192, 640, 640)]:
        x = torch.randn(M, K, device="cuda").half()
        codes, qweight = (torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda") for shape in ((M, K), (N, K)))
        scale, ones = torch.ones(M, device="cuda"), torch.ones(N, device="cuda")
        activation = QuantizedActivation(codes, scale, None, 1)
        plain = do_bench(lambda: dispatch.int8_gemm(activation, qweight, ones), return_mode="median")  # noqa: B023
        token = do_bench(lambda: dispatch.quantize_token(x), return_mode="median")  # noqa: B023
        for granularity in (64, 128):
            for count in (2, 4, 8):
                if count > K // granularity:
                    continue
                exponents = torch.tensor([max(0, count - 1 - block) for block in range(K // granularity)], dtype=torch.int8)
                groups = dispatch.channel_groups(torch.randperm(K, device="cuda").int(), exponents, granularity)
                product = do_bench(lambda: dispatch.channel_group_gemm(activation, groups, qweight, ones), return_mode="median")  # noqa: B023
                quantize = do_bench(lambda: dispatch.quantize_channel_group(x, groups), return_mode="median")  # noqa: B023
                record = {"shape": [M, N, K], "groups": count, "granularity": granularity, "p50_ms": round(product, 4)}
                record |= {"plain_p50_ms": round(plain, 4), "cost": round(product / plain - 1, 3)}
                yield record | {"quantize_p50_ms": round(quantize, 4), "quantize_token_p50_ms": round(token, 4)}


if __name__ == "__main__":
    sys.exit(main())
