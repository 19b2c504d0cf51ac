"""Builds a UNet whose layers are quantized in any way that the quality table compares, on integer kernels or simulated in floats.

Plain min-max with one scale per tensor is one end, the package's own recipes the other. Widths below 8 bits, and channel groups
finer than the GPU kernels take, are simulated: integer products give the same but for fp32's rounding. Judges nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepquant.errors import CalibrationError
from stepquant.hosts.diffusers.quantize import build_layer, replace_layer
from stepquant.hosts.diffusers.timestep_tap import TimestepTap
from stepquant.hosts.key_mapping import ldm_to_diffusers
from stepquant.quant.activation_choice import choose_grouping
from stepquant.quant.activation_noise import WIDE_MAX, above_low, group_importance
from stepquant.quant.calibration import ActivationTables, Calibration, quantized_values, static_range
from stepquant.quant.channel_group import ChannelGrouping, grouped_statistics, weight_energy, within_int32
from stepquant.quant.file_format import QuantizedLayer
from stepquant.quant.int8_rounding import gptq_int8
from stepquant.quant.layer_noise import stored_bytes
from stepquant.quant.layers import LayerSpec
from stepquant.quant.mac_counter import MacCounter
from stepquant.quant.observer import LayerStatistics
from stepquant.quant.scheme import ActivationMode, Scheme
from stepquant.quant.timestep import NUM_BUCKETS, ScaleCurve
from stepquant.quant.weight import FP8, INT8_MAX, SMALLEST_SCALE, dequantize_weight, quantize_weight

GPU_GRANULARITY = 32  # the finest channel groups that the GPU kernels take
FP8_MAX = 448.0
Groups = tuple[int, ...] | ScaleCurve


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is quantized. scheme None: fp8 as ComfyUI does it, one dynamic scale per tensor, one of the weight.

    per_tensor_weight: one weight scale for the whole layer instead of one per output channel. min_max: static ranges hold all
    that calibration saw; else some of it may be clipped (Calibration.tables). moments: of the input, to round int8 weights by.
    """

    scheme: Scheme | None
    groups: Groups = (0,) * NUM_BUCKETS
    per_tensor_weight: bool = False
    min_max: bool = False
    moments: Tensor | None = None

    @property
    def simulated(self) -> bool:
        """Whether it must run in floats, whatever the kernels could do."""
        return False

    def weight_codes(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """int8 or fp8 codes, (N, K) or (Cout, kh, kw, Cin), and scales (N,) of a float weight."""
        if self.moments is not None:
            rounded = gptq_int8(weight, self.moments.to(weight.device), name)
            return rounded.codes, rounded.scale
        if self.scheme.is_fp8:
            quantized = quantize_weight(weight, name, FP8)
            return quantized.codes, quantized.scale
        return _weight_codes(weight, name, self.per_tensor_weight)

    def stored_bytes(self, spec: LayerSpec) -> int:
        """As layer_noise.stored_bytes; of fp8 one byte a weight and one scale."""
        return stored_bytes(spec, None) // 2 + 4 if self.scheme is None else stored_bytes(spec, self.scheme)


@dataclass
class PreparedLayer:
    """codes: int8 in the model's channel order; floats of fp8 if scheme is None. tables: of static layers."""

    scheme: Scheme | None
    codes: Tensor
    weight_scale: Tensor
    tables: ActivationTables | None = None
    grouping: ChannelGrouping | None = None


class GroupingCache(dict):
    """Channel groupings by layer, groups and bits: the choice takes longer than all else and several rows share it."""


def prepare_layer(name: str, weight: Tensor, plan: LayerPlan, calibration: Calibration, bits: int, cache: GroupingCache) -> PreparedLayer:
    """Codes and tables of one layer. Raises CalibrationError if it was not observed and needs to be."""
    weight = weight.detach().float()
    if plan.scheme is None:
        scale = (weight.abs().amax() / FP8_MAX).clamp_min(SMALLEST_SCALE)
        return PreparedLayer(None, (weight / scale).to(torch.float8_e4m3fn).float() * scale, scale)
    codes, scale = plan.weight_codes(name, weight)
    prepared = PreparedLayer(plan.scheme, codes, scale)
    if not plan.scheme.needs_calibration:
        return prepared
    if name not in calibration.layers:
        raise CalibrationError(f"{name}: not in the calibration. Calibrate this model.")
    statistics, importance = calibration.layers[name], None
    if plan.scheme.is_grouped:
        key = (name, plan.groups, bits, plan.scheme)
        if key not in cache:
            cache[key] = choose_grouping(name, statistics, weight.cpu(), plan.scheme, plan.groups, _is_spatial(weight), bits)
        order = cache[key].order.long().to(codes.device)
        prepared.grouping = within_int32(cache[key], codes[..., order], plan.scheme.symmetric)
        statistics = grouped_statistics(statistics, prepared.grouping)
        importance = group_importance(prepared.grouping, weight_energy(weight).cpu())
    if plan.scheme.is_static and plan.min_max:
        prepared.tables = min_max_tables(statistics, plan.groups, plan.scheme.symmetric, bits)
    elif plan.scheme.is_static:
        prepared.tables = Calibration({name: statistics}).tables(name, plan.scheme, plan.groups, bits, importance)
    return prepared


def _weight_codes(weight: Tensor, name: str, per_tensor: bool) -> tuple[Tensor, Tensor]:
    if not per_tensor:
        quantized = quantize_weight(weight, name)
        return quantized.codes, quantized.scale
    scale = (weight.abs().amax() / INT8_MAX).clamp_min(SMALLEST_SCALE)
    rows = weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight
    codes = (rows / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8).contiguous()
    return codes, scale.expand(len(weight)).contiguous()


def _is_spatial(weight: Tensor) -> bool:
    return weight.ndim == 4 and weight.shape[-1] > 1


def min_max_tables(statistics: LayerStatistics, groups: tuple[int, ...], symmetric: bool, bits: int) -> ActivationTables:
    """Static scales that hold every value calibration saw in a timestep group. A group it never visited takes the nearest one's."""
    group_of_bucket = torch.tensor(groups)
    group_of_visit = group_of_bucket[statistics.buckets]
    low, high = statistics.range_min.amin(1), statistics.range_max.amax(1)
    scale, zero_point = torch.empty(NUM_BUCKETS), torch.empty(NUM_BUCKETS, dtype=torch.int32)
    for group in group_of_bucket.unique().tolist():
        members = group_of_visit == group_of_visit[(group_of_visit - group).abs().argmin()]
        chosen = static_range(float(low[members].min()), float(high[members].max()), symmetric, bits)
        scale[group_of_bucket == group], zero_point[group_of_bucket == group] = chosen
    return ActivationTables(scale, None if symmetric else zero_point)


class SimulatedLayer(nn.Module):
    """A Linear or Conv2d whose input is rounded to codes of any width and back, in floats. counter: as QuantizedModule's."""

    def __init__(self, name: str, prepared: PreparedLayer, original: nn.Module, tap: TimestepTap, bits: int) -> None:
        super().__init__()
        self.name, self.scheme, self.tap, self.bits = name, prepared.scheme, tap, bits
        self.counter: MacCounter | None = None
        self.grouping = prepared.grouping
        self.stride, self.padding = (original.stride, original.padding) if isinstance(original, nn.Conv2d) else (None, None)
        weight = prepared.codes
        if prepared.scheme is not None:
            weight = dequantize_weight(prepared.codes, prepared.weight_scale, torch.float32)
        self.register_buffer("weight", weight.to(original.weight.device, original.weight.dtype))
        self.register_buffer("bias", original.bias)
        tables = prepared.tables
        device = original.weight.device
        self.act_scale = None if tables is None else tables.scale.to(device)
        self.act_zero_point = None if tables is None or tables.zero_point is None else tables.zero_point.to(device)
        if self.grouping is not None:
            self.factor = torch.exp2(self.grouping.by_channel().float()).to(device)

    def forward(self, x: Tensor) -> Tensor:
        rounded = self._rounded(x).to(x.dtype)
        if self.stride is None:
            y = F.linear(rounded, self.weight, self.bias)
            macs = y.numel() * self.weight.shape[1]
        else:
            y = F.conv2d(rounded, self.weight, self.bias, self.stride, self.padding)
            macs = y.numel() * self.weight[0].numel()
        if self.counter is not None:
            self.counter.record(self.name, macs, self.scheme is not None and self.scheme.activation is not ActivationMode.FP16)
        return y

    def _rounded(self, x: Tensor) -> Tensor:
        if self.scheme is None:
            scale = (x.abs().amax().float() / FP8_MAX).clamp_min(SMALLEST_SCALE)
            return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
        if self.scheme.activation is ActivationMode.FP16:
            return x
        if self.grouping is None:
            return self._quantized(x.float())
        factor = self.factor.view(-1, 1, 1) if x.ndim == 4 else self.factor
        return self._quantized(x.float() / factor) * factor

    def _quantized(self, x: Tensor) -> Tensor:
        if self.act_scale is None:
            if _is_spatial(self.weight) and not self.scheme.symmetric:
                return above_low(x, x.amax((1, 2, 3)), self.bits)
            largest, bits = (WIDE_MAX, 16) if self.scheme.is_wide else (2 ** (self.bits - 1) - 1, self.bits)
            scale = _dynamic_absmax(x, self.weight).clamp_min(SMALLEST_SCALE) / largest
            return quantized_values(x, scale, 0, True, bits)
        shape = (-1, *[1] * (x.ndim - 1))
        zero_point = 0 if self.act_zero_point is None else self.act_zero_point[self.tap.bucket].view(shape)
        return quantized_values(x, self.act_scale[self.tap.bucket].view(shape), zero_point, self.act_zero_point is None, self.bits)


def _dynamic_absmax(x: Tensor, weight: Tensor) -> Tensor:
    """Per image of a 3x3 convolution, else per row (pixel or token)."""
    return x.abs().amax((1, 2, 3), keepdim=True) if _is_spatial(weight) else x.abs().amax(1 if x.ndim == 4 else -1, keepdim=True)


def build_unet(
    unet: nn.Module,
    plans: Mapping[str, LayerPlan],
    calibration: Calibration,
    bits: int,
    cache: GroupingCache,
    progress: Callable[[int, int], None] | None = None,
    in_floats: bool = False,
) -> tuple[nn.Module, TimestepTap, int]:
    """A copy of the UNet with the planned layers quantized; others stay as they are. in_floats: simulate all, which a CPU does faster.

    Returns: the copy, its timestep tap, and how many layers are simulated in floats.
    """
    built = copy.deepcopy(unet)
    tap, simulated = TimestepTap(built), 0
    for done, (name, plan) in enumerate(plans.items(), 1):
        path = ldm_to_diffusers(name)
        original = built.get_submodule(path)
        prepared = prepare_layer(name, original.weight, plan, calibration, bits, cache)
        if in_floats or bits < 8 or plan.simulated or not runs_as_integers(plan.scheme, original.weight.device):
            layer = SimulatedLayer(name, prepared, original, tap, bits)
            simulated += 1
        else:
            layer = build_layer(name, plan.scheme, _stored(prepared, original), original, tap).to(original.weight.device)
        replace_layer(built, path, layer)
        if progress is not None:
            progress(done, len(plans))
    return built, tap, simulated


def runs_as_integers(scheme: Scheme | None, device: torch.device) -> bool:
    return scheme is not None and not (device.type == "cuda" and scheme.is_grouped and scheme.granularity < GPU_GRANULARITY)


def _stored(prepared: PreparedLayer, original: nn.Module) -> QuantizedLayer:
    layer = QuantizedLayer(prepared.codes, prepared.weight_scale, None if original.bias is None else original.bias.detach())
    if prepared.tables is not None:
        layer.act_scale, layer.act_zero_point = prepared.tables.scale, prepared.tables.zero_point
    if prepared.grouping is not None:
        layer.channel_order, layer.channel_exponents = prepared.grouping.order, prepared.grouping.exponents
        layer.qweight = layer.qweight[..., prepared.grouping.order.long().to(layer.qweight.device)].contiguous()
    return layer
