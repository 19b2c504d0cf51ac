"""Connects a UNet built with our operations to its recipe, its timestep tap and ComfyUI's callbacks. Loads no weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import nn

from ...quant.layers import is_quantizable
from ...quant.mac_counter import MacCounter
from ...quant.recipe import Recipe
from . import lora
from .dense_saving import bind_dense_saving
from .ops import QuantizableOp
from .tap import TimestepTap

CALLBACK_KEY = "stepquant"


@dataclass
class QuantizedState:
    """What a quantized BaseModel carries as `stepquant`.

    base_model: {"name", "sha256"} of what was quantized. calibration: its summary.
    patches, backup: of the patcher that ComfyUI loaded last, kept for saving while it is loaded.
    """

    recipe: Recipe
    base_model: dict[str, str | None]
    calibration: dict[str, object]
    tap: TimestepTap = field(default_factory=TimestepTap)
    patches: Mapping = field(default_factory=dict)
    backup: Mapping = field(default_factory=dict)


def state_of(patcher: ModelPatcher) -> QuantizedState | None:
    """The state of a MODEL that StepQuant quantized; None for any other."""
    return getattr(patcher.model, "stepquant", None)


def attach(patcher: ModelPatcher, recipe: Recipe, base_model: dict[str, str | None], calibration: dict[str, object]) -> None:
    """Make the patcher's freshly built UNet one model: names, schemes, one tap, saving, callbacks (copied to clones)."""
    model = patcher.model
    model.stepquant = QuantizedState(recipe, base_model, calibration)
    model.stepquant.tap.follow(model.model_sampling)
    unet = model.diffusion_model
    for name, module in unet.named_modules():
        if isinstance(module, QuantizableOp):
            module.layer_name = name
            module.scheme = recipe.schemes.get(name, module.scheme)
            module.tap = model.stepquant.tap
    unet.time_embed[0].observes_timestep = True
    bind_dense_saving(model)
    for call, function in (
        (CallbacksMP.ON_LOAD, lora.on_load),
        (CallbacksMP.ON_PRE_RUN, lora.reconcile),
        (CallbacksMP.ON_DETACH, lora.release),
        (CallbacksMP.ON_APPLY_HOOKS, lora.forget_hook_cache),
    ):
        patcher.remove_callbacks_with_key(call, CALLBACK_KEY)
        patcher.add_callback_with_key(call, CALLBACK_KEY, function)


@contextmanager
def counting_macs(model: nn.Module) -> Iterator[MacCounter]:
    """Count the multiply-adds of a quantized BaseModel's quantizable layers while the block runs."""
    counter = MacCounter()
    layers = [m for m in model.modules() if isinstance(m, QuantizableOp) and is_quantizable(m.layer_name)]
    for layer in layers:
        layer.counter = counter
    try:
        yield counter
    finally:
        for layer in layers:
            layer.counter = None
