"""Quantizes a checkpoint or UNet file to a file, tensor by tensor: no engine, no modules, no GPU needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..errors import CalibrationError, SchemeError
from ..quant.calibration import Calibration, describe
from ..quant.corrections.bias import with_corrected_bias
from ..quant.file_format import QuantizedModel, write_model
from ..quant.layers import find_layers
from ..quant.recipe import Recipe, preset_recipe
from ..quant.rounding.method import Rounding
from ..version import VERSION
from .checkpoint_file import TensorFile, open_checkpoint, sha256_of
from .quantize_layer import check_calibrated, quantize_layer


def quantize_file(
    source: str | Path,
    out: str | Path,
    preset: str | Recipe,
    groups: int,
    calibration: Calibration | None = None,
    progress: Callable[[int, int], None] | None = None,
    rounding: Rounding | None = None,
    correct_bias: bool = False,
    moments: Callable[[str], Tensor | None] | None = None,
) -> QuantizedModel:
    """Write a quantized copy of an SDXL checkpoint, or of a file with its UNet alone.

    Peak RAM is the quantized model plus one layer; other tensors are mapped from the source and copied on writing.
    Args:
        preset: name of a preset, or a recipe for this model. groups: timestep groups of a preset.
        progress: called with (layers done, layers in all).
        rounding: of 4-bit weights; None for plain.
        moments: layer -> those of its input, to round its 8-bit weight by (quant/int8_rounding.py), or None for plain; asked for one
            layer at a time.
        correct_bias: fold what rounding adds to the mean of a layer's output into its bias; needs a calibration.
    Returns: what was written.
    Raises: FormatError if a file cannot be read or written; ModelError if the source is not SDXL or quantized already;
        SchemeError if the recipe names layers that it has not;
        WeightError if a weight is NaN or infinite; CalibrationError if a static layer was not calibrated. Nothing is
        written then.
    """
    with open_checkpoint(source) as file:
        layers = find_layers(file.unet_shapes())
        recipe = preset if isinstance(preset, Recipe) else preset_recipe(preset, layers, groups)
        unknown = next((name for name in recipe.schemes if name not in layers), None)
        if unknown is not None:
            raise SchemeError(f"{unknown}: in the recipe, but no quantizable layer of {source}. Make a plan for this model.")
        check_calibrated(recipe, calibration)
        if correct_bias and calibration is None:
            raise CalibrationError("bias correction: there is no calibration, whose rows tell the mean of every input. Calibrate first.")
        model = _quantize(file, recipe, calibration, progress, rounding, correct_bias, moments)
        model.base_model = {"name": Path(source).stem, "sha256": sha256_of(source)}
        write_model(out, model, VERSION)
    return model


def _quantize(
    file: TensorFile,
    recipe: Recipe,
    calibration: Calibration | None,
    progress,
    rounding: Rounding | None,
    correct_bias: bool,
    moments: Callable[[str], Tensor | None] | None,
) -> QuantizedModel:
    prefix = file.unet_prefix
    quantized = {}
    for done, (name, scheme) in enumerate(recipe.schemes.items(), 1):
        key = prefix + name
        weight, bias = file[f"{key}.weight"], file.get(f"{key}.bias")
        found = moments(name) if moments is not None and not scheme.is_int4 and not scheme.is_fp8 else None
        quantized[name] = quantize_layer(name, weight, bias, scheme, recipe.groups_of(name), calibration, rounding, found)
        if correct_bias:
            quantized[name] = with_corrected_bias(quantized[name], weight, calibration.layers.get(name))
        if progress is not None:
            progress(done, len(recipe.schemes))
    taken = {f"{prefix}{name}.{part}" for name in quantized for part in ("weight", "bias")}
    others = [key for key in file if key not in taken]
    rest = {key[len(prefix) :]: file[key] for key in others if key.startswith(prefix)}
    extra = {key: file[key] for key in others if not key.startswith(prefix)}
    summary = describe(calibration) if recipe.needs_calibration else {}
    return QuantizedModel(quantized, rest, recipe, calibration=summary, extra=extra)
