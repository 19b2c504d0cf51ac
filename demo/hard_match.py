"""Finds the hard variant's factors: how much each site has to grow to be as hard as SDXL's, judged layer by layer.

    python -m stepquant.demo.hard_match [--write]

Hardness of a layer is how many dB more noise an 8-bit input makes at its output than 8-bit weights do: both pass through
the same layers behind it, so that depth and width cancel. Quantizers are MixDQ's: inputs one static min-max range per tensor,
weights symmetric per output channel. Prints what was matched; --write renews hard_factors.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from ..hosts.diffusers.scale_moves import READERS, transformer_blocks
from ..hosts.diffusers.trajectory import Sampling, Trajectory, UNetCall, record_trajectory, replay
from ..quant.calibration import quantized_values, static_range
from ..quant.weight import dequantize_weight, quantize_weight
from .hard_variant import FACTORS_FILE, Factors, harden
from .pipeline import load_demo_pipeline
from .prompts import CALIBRATION

# Hardness of SDXL-Turbo's 70 transformer blocks, in dB: the 10, 30, 50, 70 and 90 % quantiles. From the sensitivity
# published with MixDQ (arXiv 2405.17873; SQNR of the UNet's output, one layer quantized at a time, one step at t = 999):
# weight_sqnr_4 + 23.1 - act_sqnr_8, without that log's fp16 floor of 84.2 dB. Its 8-bit weight figures lie on the floor;
# where they don't (99 layers below 74 dB), they are 23.1 dB above the 4-bit ones.
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
SDXL_HARDNESS_DB: Mapping[str, tuple[float, ...]] = {
    "attn1.to_q": (4.7, 7.5, 8.3, 9.5, 12.5),
    "attn1.to_k": (3.3, 4.8, 6.6, 8.7, 10.8),
    "attn1.to_v": (-7.4, -2.7, -1.0, 0.3, 2.2),
    "attn1.to_out.0": (3.0, 5.6, 6.9, 8.4, 10.0),
    "attn2.to_q": (12.5, 14.9, 17.9, 21.1, 23.1),
    "attn2.to_out.0": (6.9, 8.8, 11.3, 12.8, 15.3),
    "ff.net.0.proj": (1.2, 2.9, 3.8, 5.1, 7.8),
    "ff.net.2": (18.4, 20.3, 21.3, 22.1, 22.9),
}
# How much higher the figure is at the UNet's output than at the layer's own (demo model, first step): a weight's error is the
# same for all tokens, an input's is not, so that attention averages only the latter. Measured by benchmarks/hardness.py.
PROPAGATION_DB: Mapping[str, float] = {
    "attn1.to_q": 1.9, "attn1.to_k": 1.9, "attn1.to_v": -7.7, "attn1.to_out.0": 0.6, "attn2.to_q": 1.7, "attn2.to_out.0": -1.2,
    "ff.net.0.proj": 0.5, "ff.net.2": -1.2,
}  # fmt: skip
# The share of channels that stand out; MixDQ and research on SDXL report one in a hundred.
OUTLIER_SHARE = 0.01
GROWTHS = tuple(2 ** (step / 4) for step in range(41))
PROMPTS, SEED = 4, 10_000


def match_factors(unet: nn.Module, calls: Sequence[UNetCall]) -> dict[str, dict[int, float]]:
    """Factors for every site of every block. A layer takes SDXL's figure of its own rank among the layers of its kind.

    Moves only harden: a site that is hard enough already stays as it is. Of several readers the mean is matched.
    Args: calls: what the UNet is asked; MixDQ's protocol is the first step.
    """
    inputs = layer_inputs(unet, calls)
    targets = _targets(unet, inputs)
    factors = {}
    for path, block in transformer_blocks(unet).items():
        for site, readers in READERS.items():
            names = [f"{path}.{reader}" for reader in readers]
            x, weights = inputs[names[0]], [block.get_submodule(reader).weight for reader in readers]
            wanted = sum(targets[name] for name in names)
            best = min(GROWTHS, key=lambda growth: abs(wanted - _total_hardness(x, weights, growth)))
            channels = _outlier_factors(x, best)
            if best > 1:
                grown = channels.ne(1).nonzero().flatten().tolist()
                factors[f"{path}.{site}"] = {channel: float(f"{float(channels[channel]):.4g}") for channel in grown}
    return factors


def _total_hardness(x: Tensor, weights: Sequence[Tensor], growth: float) -> float:
    factor = _outlier_factors(x, growth)
    return sum(hardness_db(x * factor, weight / factor) for weight in weights)


def _outlier_factors(x: Tensor, growth: float) -> Tensor:
    """(K,): 1, but for the OUTLIER_SHARE of channels that are largest already, which become `growth` times the largest."""
    absmax = x.abs().amax(0)
    factor = torch.ones_like(absmax)
    if growth > 1:
        chosen = absmax.topk(max(1, round(OUTLIER_SHARE * len(absmax)))).indices
        factor[chosen] = growth * absmax.max() / absmax[chosen].clamp_min(1e-6)
    return factor


def hardness_db(x: Tensor, weight: Tensor, bits: int = 8) -> float:
    """Noise of the quantized input over that of the quantized weight, at the layer's output.

    Args: x: (M, K) fp32. weight: (N, K) fp32, of 8 bits whatever `bits` of the input are.
    """
    scale, zero_point = static_range(float(x.min()), float(x.max()), symmetric=False, bits=bits)
    codes = quantize_weight(weight, "weight")
    weight_error = dequantize_weight(codes.codes, codes.scale, torch.float32) - weight
    input_noise = ((quantized_values(x, scale, zero_point, False, bits) - x) @ weight.t()).square().sum()
    return 10 * math.log10(float(input_noise / (x @ weight_error.t()).square().sum()))


def layer_inputs(unet: nn.Module, calls: Sequence[UNetCall]) -> dict[str, Tensor]:
    """(M, K) fp32 inputs of all layers that a move reaches, by module name."""
    found: dict[str, list[Tensor]] = {}

    def watch(name: str):
        return lambda module, args: found.setdefault(name, []).append(args[0].detach().flatten(0, -2).float())

    names = [f"{path}.{reader}" for path in transformer_blocks(unet) for readers in READERS.values() for reader in readers]
    handles = [unet.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        for _ in replay(unet, Trajectory(list(calls))):
            pass
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def layer_hardness(unet: nn.Module, inputs: Mapping[str, Tensor], bits: int = 8) -> dict[str, float]:
    """hardness_db of all layers that a move reaches, by module name."""
    return {name: hardness_db(x, unet.get_submodule(name).weight, bits) for name, x in inputs.items()}


def by_kind(hardness: Mapping[str, float]) -> dict[str, list[float]]:
    """Ascending figures by kind of layer, as in SDXL_HARDNESS_DB."""
    return {kind: sorted(value for name, value in hardness.items() if name.endswith(f".{kind}")) for kind in SDXL_HARDNESS_DB}


def _targets(unet: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    hardness, targets = layer_hardness(unet, inputs), {}
    for kind, quantiles in SDXL_HARDNESS_DB.items():
        names = sorted((name for name in hardness if name.endswith(f".{kind}")), key=hardness.get)
        for rank, name in enumerate(names):
            targets[name] = _interpolated((rank + 0.5) / len(names), quantiles) - PROPAGATION_DB[kind]
    return targets


def _interpolated(share: float, quantiles: Sequence[float]) -> float:
    place = min(max((share - SHARES[0]) / (SHARES[1] - SHARES[0]), 0.0), len(SHARES) - 1.0)
    below = min(int(place), len(SHARES) - 2)
    return quantiles[below] + (place - below) * (quantiles[below + 1] - quantiles[below])


def first_calls(pipeline, prompts: int = PROMPTS) -> list[UNetCall]:
    """What the UNet is asked in the first of 20 steps, both halves of the guidance."""

    def stop(done: int, total: int) -> None:
        pipeline._interrupt = True  # diffusers' own way to stop; the pipeline clears it when it is called

    return record_trajectory(pipeline, CALIBRATION[:prompts], Sampling(20, 5.0, SEED), prompts, stop).calls


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"renew {FACTORS_FILE.name}")
    args = parser.parse_args()
    pipeline = load_demo_pipeline()
    calls = first_calls(pipeline)
    factors = match_factors(pipeline.unet, calls)
    _print_table(pipeline.unet, calls, factors)
    if args.write:
        FACTORS_FILE.write_text(json.dumps(factors, indent=0) + "\n", encoding="utf-8")


def _print_table(unet: nn.Module, calls: Sequence[UNetCall], factors: Factors) -> None:
    inputs = layer_inputs(unet, calls)
    before, hard = by_kind(layer_hardness(unet, inputs)), harden(unet, factors)
    after = by_kind(layer_hardness(hard, layer_inputs(hard, calls)))
    for kind, quantiles in SDXL_HARDNESS_DB.items():
        figures = *(median(found[kind]) + PROPAGATION_DB[kind] for found in (before, after)), quantiles[2]
        print(f"{kind:16s} demo {figures[0]:5.1f} dB, hard variant {figures[1]:5.1f}, SDXL-Turbo {figures[2]:5.1f}")  # noqa: T201


if __name__ == "__main__":
    main()
