"""Lets ComfyUI's own save nodes write a quantized MODEL as float weights that a stock ComfyUI opens. Our file is save.py's."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .lora import dense_weight, quantized_layers

UNET = "diffusion_model."
TABLES = ("act_scale", "act_zero_point")


def bind_dense_saving(model: nn.Module) -> None:
    """Give this BaseModel a state_dict_for_saving of its own. It refers weakly to the model, which else would keep itself alive."""
    reference = weakref.ref(model)
    original = type(model).state_dict_for_saving

    def state_dict_for_saving(unet_state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        model = reference()
        return original(model, dense_state_dict(model, unet_state_dict), *args, **kwargs)

    model.state_dict_for_saving = state_dict_for_saving


def dense_state_dict(model: nn.Module, unet_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's UNet state dict with every quantized layer as one 16-bit weight, LoRAs and merges applied, on the CPU."""
    dense = dict(unet_state_dict)
    state = model.stepquant
    for key, module in quantized_layers(model):
        name = key.removeprefix(UNET).removesuffix(".weight")
        for table in TABLES:
            dense.pop(f"{name}.{table}", None)
        backup = state.backup.get(key)
        weight = dense_weight(module.weight if backup is None else backup.weight, state.patches.get(key, []), key)
        dtype = torch.float16 if module.weight.dtype == torch.float32 else module.weight.dtype
        dense[f"{name}.weight"] = weight.to("cpu", dtype)
    return dense
