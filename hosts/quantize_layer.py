"""Turns one layer's float weight into what a quantized file and every engine hold. Knows no modules and no files."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..quant.activation_choice import choose_grouping
from ..quant.activation_noise import group_importance
from ..quant.calibration import Calibration, not_calibrated
from ..quant.channel_group import grouped_statistics, weight_energy, within_int32
from ..quant.file_format import QuantizedLayer
from ..quant.int8_rounding import gptq_int8
from ..quant.recipe import Recipe
from ..quant.rounding.method import Rounding
from ..quant.scheme import Scheme
from ..quant.weight import FP8, check_weight, quantize_weight


def quantize_layer(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    scheme: Scheme,
    groups: tuple[int, ...],
    calibration: Calibration | None,
    rounding: Rounding | None = None,
    moments: Tensor | None = None,
) -> QuantizedLayer:
    """Codes, scales and activation tables of one layer, on the weight's device; bias keeps its dtype.

    Args:
        calibration: may be None if the scheme needs none; check_calibrated says so in words.
        rounding: of 4-bit weights; None for plain.
        moments: (K, K) of the layer's input, to round int8 weights by (quant/int8_rounding.py); None for plain.
    Raises: WeightError if the weight or bias is NaN or infinite; CalibrationError if the layer was not observed; SchemeError if
        it has too few input channels for its groups.
    """
    rounding = rounding or Rounding()
    if scheme.rank and rounding.hessian is None and calibration is not None and name in calibration.layers:
        # Plain codes, and a branch that knows what its input looks like: 256 rows gave the demo model's all but 0.4 dB of what 40
        # prompts' Hessians give, 0 to 11 dB more than none.
        rounding = replace(rounding, hessian=lambda _: _rows_hessian(calibration, name))
    layer = _quantized_weight(name, weight.detach(), scheme, rounding, moments)
    if bias is not None:
        check_weight(bias, f"{name}.bias")
        layer.bias = bias.detach()
    importance = None
    if scheme.is_grouped:
        calibration, importance = _group(name, weight, layer, scheme, groups, calibration)
    if scheme.is_static:
        tables = calibration.tables(name, scheme, groups, importance=importance)
        layer.act_scale = tables.scale.to(weight.device)
        layer.act_zero_point = None if tables.zero_point is None else tables.zero_point.to(weight.device)
    return layer


def _quantized_weight(name: str, weight: Tensor, scheme: Scheme, rounding: Rounding, moments: Tensor | None) -> QuantizedLayer:
    if scheme.is_int4:
        int4 = rounding.round(weight, name, scheme.rank)
        branch = {} if int4.branch is None else {"branch_down": int4.branch.down, "branch_up": int4.branch.up}
        return QuantizedLayer(int4.packed(), int4.scale, group_scale=int4.group_scale, **branch)
    if moments is not None and not scheme.is_fp8:
        quantized = gptq_int8(weight, moments.to(weight.device), name)
    else:
        quantized = quantize_weight(weight, name, FP8 if scheme.is_fp8 else torch.int8)
    return QuantizedLayer(quantized.codes, quantized.scale)


def _rows_hessian(calibration: Calibration, name: str) -> Tensor:
    rows = calibration.layers[name].rows.float()
    return rows.t() @ rows


def _group(
    name: str, weight: Tensor, layer: QuantizedLayer, scheme: Scheme, groups: tuple[int, ...], calibration: Calibration
) -> tuple[Calibration, Tensor]:
    """Put the layer's codes into the order of its channel groups.

    Returns: the layer's calibration in that order and in units of the shared base scale, and what an error counts there.
    """
    statistics = calibration.layers[name]
    is_spatial = weight.ndim == 4 and weight.shape[-1] > 1
    grouping = choose_grouping(name, statistics, weight, scheme, groups, is_spatial)
    grouping = within_int32(grouping, layer.qweight[..., grouping.order.long().to(weight.device)], scheme.symmetric)
    layer.channel_order = grouping.order.to(weight.device)
    layer.channel_exponents = grouping.exponents.to(weight.device)
    layer.qweight = layer.qweight[..., layer.channel_order.long()].contiguous()
    importance = group_importance(grouping, weight_energy(weight).cpu())
    return Calibration({name: grouped_statistics(statistics, grouping)}), importance


def check_calibrated(recipe: Recipe, calibration: Calibration | None) -> None:
    """Raise CalibrationError if a layer that needs it was not calibrated, before any work is done."""
    if recipe.needs_calibration and calibration is None:
        raise CalibrationError(
            f"{recipe.preset}: there is no calibration, and it needs a calibration for its scales. Calibrate, or use w8a8-token."
        )
    for name, scheme in recipe.schemes.items():
        if scheme.needs_calibration and name not in calibration.layers:
            raise not_calibrated(name)
