"""Chooses each layer's activation mode, and a layer's channel groups, by measured SQNR. Weights' bits are not chosen here.

DGQ (arXiv 2501.04304, section 4.1) compares how far the extremes of channels and of pixels spread, which one quiet channel
decides; here every candidate is tried on the recorded rows and the layer's own weight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .activation_noise import LEAST_NOISE, bucket_sums, output_sqnr_db, simulated_rows
from .calibration import Calibration, not_calibrated
from .channel_group import ChannelGrouping, channel_magnitude, check_group_count, group_channels, max_groups, weight_energy
from .layers import has_symmetric_input, needs_row_scales
from .observer import LayerStatistics
from .recipe import DEFAULT_GROUPS, Recipe
from .scheme import ActivationMode, Scheme, token_scheme
from .timestep import ScaleCurve, uniform_groups

MEASURED = "w8a8-measured"  # the recipe's name, beside recipe.PRESETS
GROUP_COUNTS = (1, 2, 4, 8, 16)
# Channel groups cost time (shifts in the product, no fused producer): below this gain they are not worth it.
MIN_GAIN_DB = 1.0
# Groups of 64 channels cost 32 to 39 % in the product where groups of 128 cost 2 % (H100, K = 1280, 2 groups): the finer ones
# have to be so much better.
FINER_GAIN_DB = 2.0
COARSEST = 128
# For a base scale that follows the token, a channel's usual size counts, not its largest: quantiles of |x| over recorded rows.
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class ActivationChoice:
    """sqnr_db: of the layer's output by candidate, activation noise alone. groups: effective; 1 unless scheme is channel_group."""

    scheme: Scheme
    sqnr_db: Mapping[str, float]
    groups: int
    granularity: int


def choose_grouping(
    layer: str,
    statistics: LayerStatistics,
    weight: Tensor,
    scheme: Scheme,
    groups: tuple[int, ...] | ScaleCurve,
    is_conv: bool,
    bits: int = 8,
) -> ChannelGrouping:
    """The channel groups with the least noise on the recorded rows, of at most scheme.channel_groups groups.

    Candidates differ in what stands for a channel's size (its largest |x|, or a quantile) and in the number of groups. Noise
    is sum_k (error of channel k)^2 * (energy of its weights), which leaves out correlations between channels; the mean of its
    logarithm over timestep buckets counts, as in output_sqnr_db.
    Args: weight: (N, K) or (Cout, Cin, kh, kw). groups: timestep group of each of the 64 buckets.
    Raises: SchemeError if K channels do not make so many groups.
    """
    energy = weight_energy(weight).cpu()
    check_group_count(layer, len(energy), scheme.channel_groups, scheme.granularity)
    sizes = [channel_magnitude(statistics)]
    rows = statistics.rows.float()
    if rows.numel():
        sizes += list(torch.quantile(rows.abs(), torch.tensor(QUANTILES), dim=0))
    counts = sorted({min(count, scheme.channel_groups) for count in GROUP_COUNTS})
    best, least = None, torch.inf
    for size in sizes:
        for count in counts:
            candidate = group_channels(size, energy, count, scheme.granularity, layer)
            noisy = simulated_rows(statistics, scheme, groups, is_conv=is_conv, bits=bits, grouping=candidate, energy=energy)
            noise = _mean_log((noisy - rows).square() @ energy, rows.square() @ energy, statistics.row_bucket)
            if best is None or noise < least:
                best, least = candidate, noise
            if candidate.groups < count:
                break  # more would give the same
    return best


def _mean_log(noise: Tensor, energy: Tensor, row_bucket: Tensor) -> float:
    ratios = bucket_sums(noise.double(), row_bucket) / bucket_sums(energy.double(), row_bucket).clamp_min(1e-30)
    return float(ratios.clamp_min(LEAST_NOISE).log().mean())


def granularities(finest: int) -> tuple[int, ...]:
    """The channels per block to try, coarsest first: twice the finest, and the finest; 128 alone if that is the finest."""
    return tuple(dict.fromkeys((min(COARSEST, 2 * finest), finest)))


def choose_activation(
    layer: str,
    statistics: LayerStatistics,
    weight: Tensor,
    groups: tuple[int, ...] | ScaleCurve,
    channel_groups: int,
    granularity: int = 64,
    bits: int = 8,
    modes: Collection[ActivationMode] = (ActivationMode.TOKEN, ActivationMode.STATIC),
) -> ActivationChoice:
    """token, static or channel_group, whichever gives the layer's output the highest SQNR, the mean of dB over timestep buckets.

    channel_group has to be MIN_GAIN_DB better than all others, and its finest granularity FINER_GAIN_DB better than the coarser one.
    Layers whose rows need scales of their own (layers.needs_row_scales) keep token.
    Args:
        channel_groups: at most so many, fewer where K does not allow it. granularity: the finest that may be chosen.
        modes: TOKEN, STATIC or both; channel groups then have these as their base. Others as for choose_grouping.
    """
    schemes = _candidates(layer, weight.shape[1], channel_groups, granularity, modes)
    measured, effective = {}, {}
    for name, scheme in schemes.items():
        measured[name], effective[name] = _measure(layer, statistics, weight, scheme, groups, bits)
    best = max(schemes, key=lambda name: measured[name] - _handicap_db(schemes[name], granularity))
    return ActivationChoice(schemes[best], measured, effective[best], schemes[best].granularity)


def _candidates(layer: str, K: int, channel_groups: int, granularity: int, modes: Collection[ActivationMode]) -> dict[str, Scheme]:
    if needs_row_scales(layer):
        return {ActivationMode.TOKEN.value: token_scheme(layer)}
    symmetric = has_symmetric_input(layer)
    plain = {
        ActivationMode.TOKEN: token_scheme(layer),
        ActivationMode.STATIC: Scheme(activation=ActivationMode.STATIC, symmetric=symmetric),
    }
    schemes = {mode.value: plain[mode] for mode in modes}
    for size in granularities(granularity):
        counted = min(channel_groups, max_groups(K, size))
        for base in modes if counted > 1 else ():
            schemes[f"channel_group of {size} on {base.value}"] = Scheme(
                activation=ActivationMode.CHANNEL_GROUP,
                symmetric=symmetric or base is ActivationMode.TOKEN,
                channel_groups=counted,
                granularity=size,
                group_base=base,
            )
    return schemes


def _measure(
    layer: str, statistics: LayerStatistics, weight: Tensor, scheme: Scheme, groups: tuple[int, ...] | ScaleCurve, bits: int
) -> tuple[float, int]:
    """SQNR of the layer's output, and the effective number of channel groups."""
    is_conv = weight.ndim == 4 and weight.shape[-1] > 1
    grouping = choose_grouping(layer, statistics, weight, scheme, groups, is_conv, bits) if scheme.is_grouped else None
    noisy = simulated_rows(statistics, scheme, groups, is_conv=is_conv, bits=bits, grouping=grouping, energy=weight_energy(weight).cpu())
    sqnr = output_sqnr_db(statistics.rows, noisy, weight.cpu(), statistics.row_bucket)
    return sqnr, 1 if grouping is None else grouping.groups


def _handicap_db(scheme: Scheme, finest: int) -> float:
    if not scheme.is_grouped:
        return 0.0
    return MIN_GAIN_DB + (FINER_GAIN_DB if scheme.granularity < granularities(finest)[0] else 0.0)


def measured_recipe(
    calibration: Calibration,
    weight_of: Callable[[str], Tensor],
    layers: Mapping[str, object],
    channel_groups: int,
    granularity: int = 64,
    timestep_groups: int = DEFAULT_GROUPS,
) -> tuple[Recipe, dict[str, ActivationChoice]]:
    """Every layer's activation mode by measured SQNR, 8-bit weights.

    Args: weight_of: a layer's float weight by name. layers: as layers.find_layers gives them.
    Raises: CalibrationError if a layer was not observed.
    """
    groups = uniform_groups(timestep_groups)
    choices = {}
    for name in layers:
        if name not in calibration.layers:
            raise not_calibrated(name)
        choices[name] = choose_activation(name, calibration.layers[name], weight_of(name), groups, channel_groups, granularity)
    schemes = {name: choice.scheme for name, choice in choices.items()}
    return Recipe(schemes, MEASURED, "measured SQNR per layer", groups), choices
