"""Saves a quantized diffusers UNet to StepQuant's file and loads one, in SDXL's (LDM) names, so that ComfyUI reads it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import FormatError
from ...quant.file_format import QuantizedLayer, QuantizedModel, read_model, write_model
from ...version import VERSION
from ..key_mapping import diffusers_to_ldm, ldm_to_diffusers
from .attention import check_attention, set_attention
from .quantize import STATE_ATTRIBUTE, UNetState, build_layer, quantized_layers, replace_layer, state_of
from .timestep_tap import TimestepTap


def save(
    unet: nn.Module, path: str | Path, base_model: Mapping[str, str | None] | None = None, extra: Mapping[str, Tensor] | None = None
) -> None:
    """Write the quantized UNet, whole or not at all.

    Args:
        base_model: {"name", "sha256"} of what was quantized, for the header.
        extra: text encoders and VAE by their checkpoint keys; then the file is a whole checkpoint.
    Raises: ModelError if the UNet is not quantized; FormatError if the file cannot be written.
    """
    state = state_of(unet)
    layers = quantized_layers(unet)
    inside = tuple(ldm_to_diffusers(name) + "." for name in layers)
    rest = {diffusers_to_ldm(key): narrow(tensor) for key, tensor in unet.state_dict().items() if not key.startswith(inside)}
    stored = {name: _narrow_bias(layer.stored()) for name, layer in layers.items()}
    model = QuantizedModel(stored, rest, state.recipe, dict(base_model or state.base_model), state.calibration, dict(extra or {}))
    write_model(path, model, VERSION)


def load(unet: nn.Module, path: str | Path) -> nn.Module:
    """Replace a UNet's weights by those of a quantized file, in place. The UNet may be on the meta device.

    Raises: FormatError or SchemeError if the file cannot be used, naming file and layer; the UNet is unchanged then.
    Returns: the same UNet.
    """
    return install_model(unet, read_model(path), unet.dtype, str(path))


def install_model(unet: nn.Module, model: QuantizedModel, dtype: torch.dtype, source: str) -> nn.Module:
    """Give the UNet a model's layers and other tensors, these in `dtype`, on the device the UNet is on.

    Raises: FormatError naming `source` if a tensor is missing or has another shape; the UNet is unchanged then.
    """
    device = next(unet.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    _check_fits(unet, model, source)
    check_attention(unet, model.recipe.attention)
    tap = TimestepTap(unet)
    for name, scheme in model.recipe.schemes.items():
        path, stored = ldm_to_diffusers(name), model.layers[name]
        bias = None if stored.bias is None else stored.bias.to(dtype)
        layer = replace(stored, bias=bias)
        replace_layer(unet, path, build_layer(name, scheme, layer, unet.get_submodule(path), tap).to(device))
    rest = {ldm_to_diffusers(name): tensor.to(device, dtype) for name, tensor in model.rest.items()}
    unet.load_state_dict(rest, strict=False, assign=True)
    set_attention(unet, model.recipe.attention)
    setattr(unet, STATE_ATTRIBUTE, UNetState(tap, model.recipe, model.base_model, model.calibration))
    return unet


def _check_fits(unet: nn.Module, model: QuantizedModel, source: str) -> None:
    shapes = {diffusers_to_ldm(key): tuple(tensor.shape) for key, tensor in unet.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in model.rest.items()}
    for name, layer in model.layers.items():
        found[f"{name}.weight"] = layer.weight_shape
        if layer.bias is not None:
            found[f"{name}.bias"] = tuple(layer.bias.shape)
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            raise FormatError(
                f"{source}: {name}: {found.get(name, 'missing')} in the file, {shapes.get(name, 'nothing')} in the model. "
                "The file belongs to another model; load it into the one it was made from."
            )


def narrow(tensor: Tensor) -> Tensor:
    """fp16 where that holds every value exactly, as it does for an fp16 checkpoint that was opened in fp32."""
    if tensor.dtype is not torch.float32:
        return tensor
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor


def _narrow_bias(layer: QuantizedLayer) -> QuantizedLayer:
    bias = None if layer.bias is None else narrow(layer.bias)
    return replace(layer, bias=bias)
