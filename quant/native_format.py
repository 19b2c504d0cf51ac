"""Writes a quantized model as a file that ComfyUI opens without StepQuant: its own int8 format for Linears, fp16 convolutions.

The codes and weight scales of Linears are kept bit for bit, as `int8_tensorwise` with one scale per output channel. What
that format has no place for is left out: integer convolutions, calibrated activation scales, channel groups; fp8 codes, and codes
with a branch beside them, which are rounded to int8 with it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FormatError
from .atomic_file import save_tensors
from .file_format import QuantizedLayer, QuantizedModel
from .int4 import int8_codes
from .layers import UNET_PREFIX
from .scheme import ComputeType, Scheme
from .weight import dequantize_weight, quantize_weight

FORMAT = "int8_tensorwise"
# ComfyUI tells a text encoder or VAE by these; without one the file is a UNet, whose names then have no prefix.
PART_PREFIXES = ("conditioner.", "first_stage_model.")
LARGEST_HALF = 65504.0


def write_native(path: str | Path, model: QuantizedModel) -> None:
    """Write the file, whole or not at all.

    Raises: FormatError naming the layer if a convolution does not fit fp16, or if the folder cannot be written.
    """
    save_tensors(path, native_tensors(model), {"format": "pt"})


def native_tensors(model: QuantizedModel) -> dict[str, Tensor]:
    """What the file holds, by ComfyUI's own keys, on the CPU. The model is left unchanged."""
    unet = dict(model.rest)
    for name, layer in model.layers.items():
        tensors = _linear(layer, model.recipe.schemes[name], name) if layer.qweight.ndim == 2 else {"weight": _dense(layer, name)}
        unet.update({f"{name}.{part}": tensor for part, tensor in tensors.items()})
        if layer.bias is not None:
            unet[f"{name}.bias"] = layer.bias
    whole = any(key.startswith(PART_PREFIXES) for key in model.extra)
    prefix = UNET_PREFIX if whole else ""
    tensors = {prefix + key: tensor for key, tensor in unet.items()} | model.extra
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _linear(layer: QuantizedLayer, scheme: Scheme, name: str) -> dict[str, Tensor]:
    settings: dict[str, object] = {"format": FORMAT}
    if scheme.compute is ComputeType.FP16:
        settings["full_precision_matrix_mult"] = True
    if scheme.is_fp8 or layer.branch_up is not None:
        codes = layer.qweight if scheme.is_fp8 else int8_codes(layer.qweight, layer.group_scale)
        weight = dequantize_weight(codes, layer.weight_scale, torch.float32)
        weight = weight if layer.branch_up is None else weight + layer.branch_up.float() @ layer.branch_down.float()
        rounded = quantize_weight(weight, name)
        layer = QuantizedLayer(rounded.codes, rounded.scale)
    return {
        "weight": _original_order(layer),
        "weight_scale": layer.weight_scale.float().view(-1, 1),
        "comfy_quant": torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8),
    }


def _dense(layer: QuantizedLayer, name: str) -> Tensor:
    """OIHW fp16 of a convolution, which the format cannot hold as codes."""
    weight = _original_order(layer).float() * layer.weight_scale.float().view(-1, 1, 1, 1)
    if float(weight.abs().amax()) > LARGEST_HALF:
        raise FormatError(f"{name}: weights up to {float(weight.abs().amax()):.0f} do not fit 16 bit. Export another model.")
    return weight.permute(0, 3, 1, 2).half()


def _original_order(layer: QuantizedLayer) -> Tensor:
    """Codes with the input channels where the model has them; layers with channel groups store them in another order.

    4-bit codes times their group's scale are int8 codes of the same channel scale.
    """
    if layer.group_scale is not None:
        return int8_codes(layer.qweight, layer.group_scale)
    if layer.channel_order is None:
        return layer.qweight
    return layer.qweight.index_select(-1, torch.argsort(layer.channel_order.to(layer.qweight.device)))
