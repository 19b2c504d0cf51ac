"""A variant of a UNet that computes the same function but whose activations are as hard to quantize as SDXL's.

Only scales move, from a tensor's channels into the weights that read them, and back out of those that write them:
    LayerNorm -> q, k, v and ff.net.0        norm weight and bias * f[c], columns / f[c]
    value half of ff.net.0 -> ff.net.2       rows * f[c], columns / f[c]  (the gate is left alone)
    V -> to_out                              rows * f[c], columns / f[c]
    text context -> cross k, v               one more channel, 0 but for start tokens, with zero columns
Convolutions after SiLU can't be hardened so: SiLU(f x) is not f SiLU(x).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from ..hosts.diffusers.trajectory import Trajectory, UNetCall, replay
from ..quant.calibration import quantized_values, static_range
from ..quant.log2_attention import CHUNK
from ..quant.sqnr import StepSqnr
from ..quant.weight import dequantize_weight, quantize_weight

# How many dB more an 8-bit input costs the UNet's output than 8-bit weights of the same layer: both pass through the same
# layers behind it, so that depth and width cancel. Medians over SDXL-Turbo's 70 blocks, from the sensitivity published with
# MixDQ (arXiv 2405.17873): weight_sqnr_8 - act_sqnr_8. The weights' figures are near that log's fp16 floor (83 dB), so that the
# attention kinds are lower bounds.
SDXL_GAP_DB: Mapping[str, float] = {
    "attn1.to_q": 3.2, "attn1.to_k": 1.9, "attn1.to_v": -0.6, "attn1.to_out.0": 4.7, "attn2.to_q": 1.7, "attn2.to_out.0": 1.3,
    "ff.net.0.proj": 3.7, "ff.net.2": 19.7,
}  # fmt: skip
# The share of channels that stand out; MixDQ and research on SDXL report one in a hundred.
OUTLIER_SHARE = 0.01
# absmax of SDXL's start token in the text context, among tokens of about 10 (MixDQ, section 4.1).
START_VALUE = 800.0
EXTRA_CHANNELS = 8  # of which one is used: rows of codes stay a multiple of 8
# Layers that read what one move scales.
SITES: Mapping[str, tuple[str, ...]] = {
    "norm1": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "norm2": ("attn2.to_q",),
    "norm3": ("ff.net.0.proj",),
    "value": ("ff.net.2",),
    "attn1": ("attn1.to_out.0",),
    "attn2": ("attn2.to_out.0",),
}


@torch.no_grad()
def harden(unet: nn.Module, growth: Mapping[str, float], absmax: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a diffusers SDXL UNet with outliers in its transformer blocks and its text context; the same function.

    Args:
        growth: by site, how many times larger the input's absmax becomes; 1 or less leaves the site alone.
        absmax: (K,) of each layer's input by module name, as channel_absmax finds it.
    """
    hard = copy.deepcopy(unet)
    for path, block in hard.named_modules():
        if not hasattr(block, "attn1") or not hasattr(block, "norm3"):
            continue

        def factors(site: str, path: str = path) -> Tensor:
            return outlier_factors(absmax[f"{path}.{SITES[site][0]}"], growth.get(site, 1.0))

        for norm, site in ((block.norm1, "norm1"), (block.norm2, "norm2"), (block.norm3, "norm3")):
            factor = factors(site)
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            for reader in SITES[site]:
                block.get_submodule(reader).weight.div_(factor)
        _move(block.ff.net[0].proj, block.ff.net[2], factors("value"))
        _move(block.attn1.to_v, block.attn1.to_out[0], factors("attn1"))
        _move(block.attn2.to_v, block.attn2.to_out[0], factors("attn2"))
        for layer in (block.attn2.to_k, block.attn2.to_v):
            layer.weight = nn.Parameter(nn.functional.pad(layer.weight, (0, EXTRA_CHANNELS)), requires_grad=False)
            layer.in_features += EXTRA_CHANNELS
    hard.register_forward_pre_hook(_widen_context, with_kwargs=True)
    return hard


def outlier_factors(absmax: Tensor, growth: float) -> Tensor:
    """(K,): 1, but for the OUTLIER_SHARE of channels that are largest already, which become `growth` times the largest."""
    factor = torch.ones_like(absmax)
    if growth > 1:
        chosen = absmax.topk(max(1, round(OUTLIER_SHARE * len(absmax)))).indices
        factor[chosen] = growth * absmax.max() / absmax[chosen].clamp_min(1e-6)
    return factor


def _move(writer: nn.Linear, reader: nn.Linear, factor: Tensor) -> None:
    """Scale the first rows of `writer`, as many as there are factors: GEGLU's values come before its gates."""
    rows = len(factor)
    writer.weight[:rows].mul_(factor[:, None])
    if writer.bias is not None:
        writer.bias[:rows].mul_(factor)
    reader.weight.div_(factor)


def _widen_context(unet: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    context = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
    if context.shape[-1] != unet.config.cross_attention_dim:
        return args, kwargs  # a recorded call, which was widened when it was recorded
    wide = nn.functional.pad(context, (0, EXTRA_CHANNELS))
    wide[:, ::CHUNK, context.shape[-1]] = START_VALUE  # CLIP puts a start token first in every chunk
    if "encoder_hidden_states" in kwargs:
        return args, kwargs | {"encoder_hidden_states": wide}
    return (*args[:2], wide, *args[3:]), kwargs


def site_layers(unet: nn.Module) -> dict[str, list[str]]:
    """Module names of all layers of each kind that a move reaches."""
    kinds = [kind for readers in SITES.values() for kind in readers]
    return {kind: [name for name, _ in unet.named_modules() if name.endswith(f".{kind}")] for kind in kinds}


def channel_ranges(unet: nn.Module, calls: Sequence[UNetCall]) -> dict[str, tuple[Tensor, Tensor]]:
    """(K,) lowest and highest input of each layer's channels over the calls, by module name."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str):
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            low, high = args[0].detach().flatten(0, -2).aminmax(dim=0)
            before_low, before_high = found.get(name, (low, high))
            found[name] = torch.minimum(low, before_low), torch.maximum(high, before_high)

        return before

    handles = [unet.get_submodule(name).register_forward_pre_hook(watch(name)) for layers in site_layers(unet).values() for name in layers]
    try:
        _output_sqnr(unet, calls)
    finally:
        for handle in handles:
            handle.remove()
    return found


def channel_absmax(unet: nn.Module, calls: Sequence[UNetCall]) -> dict[str, Tensor]:
    """(K,) absmax of each layer's input channels over the calls, by module name."""
    return {name: torch.maximum(-low, high).float() for name, (low, high) in channel_ranges(unet, calls).items()}


def activation_sqnr_db(unet: nn.Module, calls: Sequence[UNetCall]) -> dict[str, float]:
    """SQNR of the UNet's output with one layer's input in 8 bits, each layer alone: one static min-max range (MixDQ's protocol)."""

    def quantizing(scale: float, zero_point: int):
        return lambda module, args: (quantized_values(args[0], scale, zero_point, False), *args[1:])

    found = {}
    for name, (low, high) in channel_ranges(unet, calls).items():
        scale, zero_point = static_range(float(low.min()), float(high.max()), symmetric=False)
        handle = unet.get_submodule(name).register_forward_pre_hook(quantizing(scale, zero_point))
        found[name] = _output_sqnr(unet, calls)
        handle.remove()
    return found


def weight_sqnr_db(unet: nn.Module, calls: Sequence[UNetCall]) -> dict[str, float]:
    """SQNR of the UNet's output with one layer's weight in 8 bits, each layer alone: symmetric per output channel."""
    found = {}
    for name in (name for layers in site_layers(unet).values() for name in layers):
        layer = unet.get_submodule(name)
        weight, codes = layer.weight, quantize_weight(layer.weight, name)
        layer.weight = nn.Parameter(dequantize_weight(codes.codes, codes.scale, weight.dtype), requires_grad=False)
        found[name] = _output_sqnr(unet, calls)
        layer.weight = weight
    return found


def _output_sqnr(unet: nn.Module, calls: Sequence[UNetCall]) -> float:
    meter = StepSqnr()
    for call, answer in replay(unet, Trajectory(list(calls))):
        meter.add(0, call.output, answer)
    return meter.mean_db()


def gaps_db(unet: nn.Module, activation: Mapping[str, float], weight: Mapping[str, float]) -> dict[str, float]:
    """Median over layers of what an 8-bit input costs more than 8-bit weights, by kind of layer, as SDXL_GAP_DB."""
    return {kind: median(weight[name] - activation[name] for name in names) for kind, names in site_layers(unet).items()}


def matched_growth(gaps: Mapping[str, float]) -> dict[str, float]:
    """By site, the growth that brings its layers to SDXL's gaps: a range g times as wide makes up to 20 log10(g) dB more noise.

    A site whose layers are as hard already stays as it is. Of several readers the mean is matched.
    """
    growth = {}
    for site, kinds in SITES.items():
        missing = sum(SDXL_GAP_DB[kind] - gaps[kind] for kind in kinds) / len(kinds)
        growth[site] = max(1.0, 10 ** (missing / 20))
    return growth
