"""Turns one layer's float weight into what a quantized file and every engine hold. Knows no modules and no files."""

from __future__ import annotations

from torch import Tensor

from ..errors import CalibrationError
from ..quant.calibration import Calibration, not_calibrated
from ..quant.file_format import QuantizedLayer
from ..quant.recipe import Recipe
from ..quant.scheme import ActivationMode, Scheme
from ..quant.weight import check_weight, quantize_weight


def quantize_layer(
    name: str, weight: Tensor, bias: Tensor | None, scheme: Scheme, groups: tuple[int, ...], calibration: Calibration | None
) -> QuantizedLayer:
    """Codes, scales and activation tables of one layer, on the weight's device; bias keeps its dtype.

    Args:
        calibration: may be None if the scheme is not static; check_calibrated says so in words.
    Raises: WeightError if the weight or bias is NaN or infinite; CalibrationError if a static layer was not observed.
    """
    quantized = quantize_weight(weight.detach(), name)
    if bias is not None:
        check_weight(bias, f"{name}.bias")
    layer = QuantizedLayer(quantized.codes, quantized.scale, None if bias is None else bias.detach())
    if scheme.activation is ActivationMode.STATIC:
        tables = calibration.tables(name, scheme, groups)
        layer.act_scale = tables.scale.to(weight.device)
        layer.act_zero_point = None if tables.zero_point is None else tables.zero_point.to(weight.device)
    return layer


def check_calibrated(recipe: Recipe, calibration: Calibration | None) -> None:
    """Raise CalibrationError if a static layer of the recipe was not calibrated, before any work is done."""
    if recipe.needs_calibration and calibration is None:
        raise CalibrationError(
            f"{recipe.preset}: there is no calibration, and it needs a calibration for its scales. Calibrate, or use w8a8-token."
        )
    for name, scheme in recipe.schemes.items():
        if scheme.activation is ActivationMode.STATIC and name not in calibration.layers:
            raise not_calibrated(name)
