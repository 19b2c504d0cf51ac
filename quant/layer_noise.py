"""What each scheme costs one layer: noise that reaches the UNet's output, over the schedule, and bytes. Chooses nothing (see plan.py).

Noise of a layer's output, relative to that output: of the activation, from the recorded rows as the scheme's codes hold them;
of the weight, from its codes, on the same rows. A convolution's taps count as independent, which rounding errors are. Of a prompt's
tokens the noisiest counts for itself: it is the start token, which has the outliers, and most of pixels' attention.
What of it reaches the UNet's output was measured (sensitivity.py). Weight and activation noise add up.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .activation_choice import FINER_GAIN_DB, MIN_GAIN_DB, choose_grouping, granularities
from .activation_noise import simulated_rows
from .channel_group import max_groups, weight_energy
from .int4 import GROUP_SIZE, can_be_int4
from .int8_rounding import gptq_int8
from .layers import LayerSpec, has_symmetric_input, needs_row_scales, reads_prompt
from .low_rank import low_rank_bytes
from .observer import LayerStatistics
from .rounding.method import Rounding
from .scheme import TOKEN16, ActivationMode, ComputeType, Scheme, token_scheme
from .sensitivity import LayerSensitivity
from .timestep import NUM_BUCKETS, ScaleCurve
from .weight import dequantize_weight, quantize_weight

FP16 = "fp16"
WEIGHT_ONLY = "w8a16"
TOKEN, STATIC, CHANNEL_GROUP = (mode.value for mode in (ActivationMode.TOKEN, ActivationMode.STATIC, ActivationMode.CHANNEL_GROUP))
WIDE = ActivationMode.TOKEN16.value
TOKEN_GROUP = "channel_group on token"  # channel groups whose base scale follows the row, or the image
INT4_TOKEN, INT4_STATIC, INT4_WEIGHT_ONLY = "w4 token", "w4 static", "w4a16"

# Time per multiply-add against fp16: the order matters to a plan, not the figures. int8 products have twice fp16's rate on every
# card that has them; a dynamic scale is one more pass over the input, channel groups shift inside the product. 4-bit weights are
# unpacked in the product: 1.27 times int8's on an H200.
TIME_PER_MAC = {FP16: 1.0, WEIGHT_ONLY: 1.05, STATIC: 0.5, TOKEN: 0.55, CHANNEL_GROUP: 0.6, TOKEN_GROUP: 0.65}
# Two products, and a quantizer that writes twice as much: 1.17 times fp16's time in convolutions on an H200, 1.8 in Linears. Cards whose
# int8 rate is four times fp16's were not measured.
TIME_PER_MAC[WIDE] = 1.2
TIME_PER_MAC |= {INT4_STATIC: 0.64, INT4_TOKEN: 0.69, INT4_WEIGHT_ONLY: 1.3}
# Of what cross-attention puts out: about half of a pixel's attention goes to the start token, so a quarter of the energy.
START_TOKEN_ENERGY = 0.25
# Of a layer with a branch against the same without: two more small products and a pass over the input (SVDQuant, arXiv 2411.05007:
# 57 % where nothing of it is fused, as here).
BRANCH_TIME = 1.57


@dataclass(frozen=True)
class Option:
    """One scheme for one layer; None keeps the layer 16 bit.

    local_noise: (V,) float64, energy relative to the layer's own output, per visited bucket. noise: (V,) float64, what of it
    reaches the UNet's output, relative to that output. stored_bytes: in a file and in memory.
    """

    label: str
    scheme: Scheme | None
    local_noise: Tensor
    noise: Tensor
    stored_bytes: int

    @property
    def is_integer(self) -> bool:
        return self.label not in (FP16, WEIGHT_ONLY, INT4_WEIGHT_ONLY)

    @property
    def is_wide(self) -> bool:
        return self.scheme is not None and self.scheme.is_wide

    @property
    def time_per_mac(self) -> float:
        """Against fp16's."""
        rank = 0 if self.scheme is None else self.scheme.rank
        return TIME_PER_MAC[self.label.removesuffix(rank_suffix(rank))] * (BRANCH_TIME if rank else 1)


@dataclass(frozen=True)
class LayerOptions:
    """buckets: (V,) int64, visited. macs: multiply-adds during the calibration, to weigh layers against each other."""

    name: str
    buckets: Tensor
    macs: float
    options: tuple[Option, ...]
    dequantized_bytes: int

    def find(self, label: str) -> Option | None:
        return next((option for option in self.options if option.label == label), None)


def rank_suffix(rank: int) -> str:
    """What an option's label ends in whose scheme has a branch."""
    return f" r{rank}" if rank else ""


def candidate_schemes(
    spec: LayerSpec, channel_groups: int = 1, granularity: int = 64, int4: bool = False, ranks: Sequence[int] = ()
) -> dict[str, Scheme | None]:
    """The schemes a plan may choose from for one layer, by label.

    Args: channel_groups: more than 1 adds channel groups where the layer has channels enough. granularity: the finest; layer_options
        takes the coarser one of activation_choice.granularities unless this gains FINER_GAIN_DB. int4: adds 4-bit weights where they fit.
        ranks: of branches that 4-bit weights with integer products are offered with too, where they take less than half the codes' bytes.
    """
    found: dict[str, Scheme | None] = {TOKEN: token_scheme(spec.name)}
    groups = min(channel_groups, spec.in_channels // granularity)
    grouped = Scheme(activation=ActivationMode.CHANNEL_GROUP, channel_groups=groups, granularity=granularity)
    if not needs_row_scales(spec.name):
        symmetric = has_symmetric_input(spec.name)
        found[STATIC] = Scheme(activation=ActivationMode.STATIC, symmetric=symmetric)
        if groups > 1:
            found[CHANNEL_GROUP] = replace(grouped, symmetric=symmetric)
    if groups > 1:
        found[TOKEN_GROUP] = replace(grouped, group_base=ActivationMode.TOKEN)
    weight_only = Scheme(activation=ActivationMode.FP16, compute=ComputeType.FP16)
    if int4 and can_be_int4(spec.shape):
        twins = {INT4_TOKEN: found[TOKEN], INT4_STATIC: found.get(STATIC), INT4_WEIGHT_ONLY: weight_only}
        found |= {label: replace(scheme, weight_bits=4) for label, scheme in twins.items() if scheme is not None}
        small = [rank for rank in ranks if low_rank_bytes(spec.shape, rank) < math.prod(spec.shape) // 4]
        with_branches = [(label, rank) for label in (INT4_TOKEN, INT4_STATIC) if label in found for rank in small]
        found |= {label + rank_suffix(rank): replace(found[label], rank=rank) for label, rank in with_branches}
    return {**found, WIDE: TOKEN16, WEIGHT_ONLY: weight_only, FP16: None}


def layer_options(
    spec: LayerSpec,
    weight: Tensor,
    statistics: LayerStatistics,
    sensitivity: LayerSensitivity,
    groups: tuple[int, ...] | ScaleCurve,
    schemes: Mapping[str, Scheme | None],
    rounding: Rounding | None = None,
    moments: Tensor | None = None,
) -> LayerOptions:
    """Noise and bytes of every scheme.

    Args:
        weight: (N, K) or (Cout, Cin, kh, kw), any float dtype and device; left unchanged.
        groups: of static scales, as Recipe.groups_of gives them.
        rounding: of 4-bit weights; None for plain. moments: of the layer's input, if int8 weights will be rounded by them
            (int8_rounding.py); their noise is then less by the share that they tell, which recorded rows, without neighbours, cannot.
    Raises: WeightError if the weight is not finite; what `rounding` raises.
    """
    weight = weight.detach().float()
    matrix = _as_matrix(weight)
    rows = statistics.rows.float().to(weight.device)
    gain, ratio = sensitivity.at(statistics.buckets)

    def per_bucket(noise_rows: Tensor) -> Tensor:
        """(R,) noise energy of each row's output -> (V,) relative to the output's energy."""
        mean = _bucket_means(statistics, noise_rows.double().cpu(), rows.square().sum(1).double().cpu()) / ratio
        if not reads_prompt(spec.name):
            return mean
        worst = (noise_rows / (rows @ matrix).square().sum(1).clamp_min(1e-30)).max()
        return mean.clamp_min(START_TOKEN_ENERGY * float(worst))

    kinds = {(scheme.weight_bits, scheme.rank) for scheme in schemes.values() if scheme is not None}
    rounded, branches = _rounded_weights(spec.name, weight, kinds, rounding or Rounding())
    weight_noise = {kind: per_bucket((rows @ (_as_matrix(one) - matrix)).square().sum(1)) for kind, one in rounded.items()}
    if moments is not None and (8, 0) in weight_noise:
        weight_noise[8, 0] = weight_noise[8, 0] * rounding_gain(spec.name, weight, rounded[8, 0], moments.to(weight.device))
    options, plain = [], []
    for label, scheme in schemes.items():
        local = torch.zeros_like(gain)
        if scheme is not None:
            local = weight_noise[scheme.weight_bits, scheme.rank]
        if scheme is not None and scheme.activation is not ActivationMode.FP16:
            found = []
            # A branch reads floats: codes of the input meet only what it leaves of the weight.
            met = matrix - _as_matrix(branches[scheme.rank]) if scheme.rank else matrix
            for one in _granularities(scheme, spec.in_channels):
                noisy = _noisy_rows(spec, weight, statistics, one, groups)
                found.append((one, per_bucket(((noisy - rows) @ met).square().sum(1))))
                if _mean_log10(found[-1][1]) > min(plain, default=math.inf):
                    break  # finer groups will not make up for that
            if not scheme.is_grouped and not scheme.rank:
                plain.append(_mean_log10(found[-1][1]))
            scheme, noise = _coarsest_good(found)
            local = local + noise
        options.append(Option(label, scheme, local, local * gain, stored_bytes(spec, scheme)))
    return LayerOptions(spec.name, statistics.buckets, _macs(spec, statistics), _worth_it(options), 2 * math.prod(spec.shape))


def _noisy_rows(
    spec: LayerSpec, weight: Tensor, statistics: LayerStatistics, scheme: Scheme, groups: tuple[int, ...] | ScaleCurve
) -> Tensor:
    """The recorded rows as the scheme's codes hold them, (R, K) fp32 on the weight's device."""
    is_conv = spec.is_conv and spec.shape[-1] > 1
    grouping = choose_grouping(spec.name, statistics, weight, scheme, groups, is_conv) if scheme.is_grouped else None
    energy = weight_energy(weight).cpu() if scheme.is_grouped else None
    return simulated_rows(statistics, scheme, groups, is_conv=is_conv, grouping=grouping, energy=energy).to(weight.device)


def _mean_log10(noise: Tensor) -> float:
    return float(noise.clamp_min(1e-30).log10().mean())


def rounding_gain(name: str, weight: Tensor, plain: Tensor, moments: Tensor) -> float:
    """Noise of the layer's output with weights rounded by the moments, relative to that of plainly rounded ones."""
    codes = gptq_int8(weight, moments, name)
    errors = [(one - weight).flatten(1) for one in (dequantize_weight(codes.codes, codes.scale, torch.float32), plain)]
    noise = [float(((error @ moments) * error).sum()) for error in errors]
    return noise[0] / max(noise[1], 1e-30)


def _granularities(scheme: Scheme, K: int) -> list[Scheme]:
    """The scheme itself, or its channel groups with each granularity that makes two groups at least, coarsest first."""
    if not scheme.is_grouped:
        return [scheme]
    sizes = [size for size in granularities(scheme.granularity) if size == scheme.granularity or max_groups(K, size) > 1]
    return [replace(scheme, granularity=size, channel_groups=min(scheme.channel_groups, max_groups(K, size))) for size in sizes]


def _coarsest_good(found: list[tuple[Scheme, Tensor]]) -> tuple[Scheme, Tensor]:
    """The first of (scheme, noise per bucket), unless the last makes FINER_GAIN_DB less noise, in the mean over buckets."""
    (_, coarse), (_, fine) = found[0], found[-1]
    gain = 10 * (_mean_log10(coarse) - _mean_log10(fine))
    return found[-1] if gain >= FINER_GAIN_DB else found[0]


def _rounded_weights(
    name: str, weight: Tensor, kinds: Collection[tuple[int, int]], rounding: Rounding
) -> tuple[dict[tuple[int, int], Tensor], dict[int, Tensor]]:
    """fp32 weights of the layer's own shape that codes of each (bits, rank) stand for, and the branches in them by rank."""
    rounded, branches = {}, {}
    for bits, rank in kinds:
        if bits == 4:
            int4 = rounding.round(weight, name, rank)
            rounded[bits, rank] = int4.dequantize()
            if rank:
                branches[rank] = int4.branch.dense()
        else:
            codes = quantize_weight(weight, name)
            rounded[bits, rank] = dequantize_weight(codes.codes, codes.scale, torch.float32)
    return rounded, branches


def _worth_it(options: list[Option]) -> tuple[Option, ...]:
    """Channel groups only where they make the layer's noise MIN_GAIN_DB less than any plain scheme of 8-bit codes."""

    def is_grouped(option: Option) -> bool:
        return option.scheme is not None and option.scheme.is_grouped

    plain = [float(option.noise.mean()) for option in options if option.is_integer and not (is_grouped(option) or option.is_wide)]
    least = min(plain, default=math.inf) * 10 ** (-MIN_GAIN_DB / 10)
    return tuple(option for option in options if not is_grouped(option) or float(option.noise.mean()) <= least)


def stored_bytes(spec: LayerSpec, scheme: Scheme | None) -> int:
    """Bytes of a layer's weight, scales and tables; its bias is 16 bit in every scheme and not counted."""
    count = math.prod(spec.shape)
    if scheme is None:
        return 2 * count
    tables = NUM_BUCKETS * (4 if scheme.symmetric else 8) if scheme.is_static else 0
    order = 4 * spec.in_channels + spec.in_channels // scheme.granularity if scheme.is_grouped else 0
    group_scales = count // GROUP_SIZE if scheme.is_int4 else 0
    branch = low_rank_bytes(spec.shape, scheme.rank) if scheme.rank else 0
    return count * scheme.weight_bits // 8 + group_scales + 4 * spec.shape[0] + tables + order + branch


def _as_matrix(weight: Tensor) -> Tensor:
    """(N, K) or (Cout, Cin, kh, kw) -> (K, N * taps)."""
    return weight.transpose(0, 1).flatten(1)


def _bucket_means(statistics: LayerStatistics, noise: Tensor, energy: Tensor) -> Tensor:
    """(V,): noise over energy of each visited bucket's rows; a bucket without rows takes the mean of all."""
    slot = torch.searchsorted(statistics.buckets, statistics.row_bucket)
    sums = [torch.zeros(len(statistics.buckets), dtype=torch.float64).index_add_(0, slot, part) for part in (noise, energy)]
    overall = noise.sum() / energy.sum().clamp_min(1e-30)
    return torch.where(sums[1] > 0, sums[0] / sums[1].clamp_min(1e-30), overall)


def _macs(spec: LayerSpec, statistics: LayerStatistics) -> float:
    # Inputs are counted; SDXL's only strided layers are its downsamplers, which make a quarter as many outputs.
    outputs = float(statistics.count.sum()) / (4 if spec.name.endswith(".op") else 1)
    return outputs * math.prod(spec.shape)
