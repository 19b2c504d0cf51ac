"""Quantizes a diffusers SDXL UNet in place, one layer at a time. Reads and writes no files (see unet_file.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ...errors import ModelError, SchemeError
from ...quant.calibration import Calibration, describe
from ...quant.file_format import QuantizedLayer
from ...quant.layers import check_is_sdxl, find_layers
from ...quant.mac_counter import MacCounter
from ...quant.recipe import Recipe
from ...quant.rounding.method import Rounding
from ...quant.scheme import Scheme
from ...quant.weight import check_weight
from ..key_mapping import UnknownUNetKey, diffusers_to_ldm, ldm_to_diffusers
from ..quantize_layer import check_calibrated, quantize_layer
from .attention import check_attention, set_attention
from .layers import QuantizedConv2d, QuantizedLinear, QuantizedModule
from .timestep_tap import TimestepTap

STATE_ATTRIBUTE = "stepquant"


@dataclass
class UNetState:
    """What a quantized UNet carries beside its layers: where its buckets come from and what a file's header needs."""

    tap: TimestepTap
    recipe: Recipe
    base_model: dict[str, str | None] = field(default_factory=dict)
    calibration: dict[str, object] = field(default_factory=dict)


def quantize_unet(
    unet: nn.Module,
    recipe: Recipe,
    calibration: Calibration | None = None,
    rounding: Rounding | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Replace the recipe's layers by quantized ones, in place; each float weight is released as its codes are made.

    Args:
        unet: a diffusers UNet2DConditionModel of SDXL's topology, any device and float dtype.
        calibration: needed if a scheme is static. rounding: of 4-bit weights; None for plain.
        moments: by layer, from second_moments.gather_second_moments: those layers' int8 weights are rounded by them.
    Returns: the same UNet.
    Raises: ModelError if it is not SDXL's or quantized already; SchemeError if the recipe names another model's
        layers; CalibrationError if a static layer was not observed; WeightError if a weight is NaN or infinite.
        The UNet is unchanged then.
    """
    check_quantizable(unet, recipe, calibration)
    state = UNetState(TimestepTap(unet), recipe, calibration=describe(calibration) if recipe.needs_calibration else {})
    for name, scheme in recipe.schemes.items():
        path = ldm_to_diffusers(name)
        original = unet.get_submodule(path)
        how = (scheme, recipe.groups_of(name), calibration, rounding, (moments or {}).get(name))
        layer = quantize_layer(name, original.weight, original.bias, *how)
        replace_layer(unet, path, build_layer(name, scheme, layer, original, state.tap))
    set_attention(unet, recipe.attention)
    setattr(unet, STATE_ATTRIBUTE, state)
    return unet


def build_layer(name: str, scheme: Scheme, layer: QuantizedLayer, original: nn.Module, tap: TimestepTap) -> QuantizedModule:
    """The module that takes the place of `original`, a Linear or Conv2d whose weight is not read."""
    if isinstance(original, nn.Conv2d):
        return QuantizedConv2d(name, scheme, layer, tap, original.stride[0], original.padding[0])
    return QuantizedLinear(name, scheme, layer, tap)


def replace_layer(unet: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(unet.get_submodule(parent), child, module)


def check_quantizable(unet: nn.Module, recipe: Recipe, calibration: Calibration | None) -> None:
    """Raise what quantize_unet would, before anything is changed."""
    shapes = unet_shapes(unet)
    check_is_sdxl(shapes, "UNet")
    layers = find_layers(shapes)
    for name in recipe.schemes:
        if name not in layers:
            raise SchemeError(f"{name}: in the recipe, but no quantizable layer of this UNet. Make the recipe for this model.")
        check_weight(unet.get_submodule(ldm_to_diffusers(name)).weight, name)
    check_attention(unet, recipe.attention)
    check_calibrated(recipe, calibration)


def unet_shapes(unet: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter and buffer by its LDM name.

    Raises: ModelError if a name is outside SDXL's topology.
    """
    try:
        return {diffusers_to_ldm(key): tuple(tensor.shape) for key, tensor in unet.state_dict().items()}
    except UnknownUNetKey as error:
        raise ModelError(f"UNet: not of SDXL's topology ({error.args[0]})") from None


def is_quantized(unet: nn.Module) -> bool:
    return hasattr(unet, STATE_ATTRIBUTE)


def state_of(unet: nn.Module) -> UNetState:
    """Raises ModelError if the UNet is not quantized."""
    state = getattr(unet, STATE_ATTRIBUTE, None)
    if state is None:
        raise ModelError("UNet: not quantized by StepQuant. Call quantize_unet or load first.")
    return state


def quantized_layers(unet: nn.Module) -> dict[str, QuantizedModule]:
    """The quantized layers by LDM name; empty if there are none."""
    return {module.name: module for module in unet.modules() if isinstance(module, QuantizedModule)}


def attach_counter(unet: nn.Module, counter: MacCounter | None) -> None:
    """Let every quantized layer report its multiply-adds to `counter`; None stops it."""
    for layer in quantized_layers(unet).values():
        layer.counter = counter


def weight_bytes(unet: nn.Module) -> int:
    """Bytes of all parameters and buffers as they lie in memory, each storage once."""
    tensors = [*unet.parameters(), *unet.buffers()]
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())
