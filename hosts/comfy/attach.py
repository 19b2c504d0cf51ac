"""Connects a UNet built with our operations to its recipe, its timestep tap and ComfyUI's callbacks. Loads no weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import nn

from ...quant.layers import is_quantizable
from ...quant.mac_counter import MacCounter
from ...quant.recipe import Recipe
from ..acceleration import Acceleration
from . import blocks, kv_cache, lora, saturation, scale_lora, vram_account
from .attention import set_attention
from .dense_saving import bind_dense_saving
from .graph import UNetRunner, bind_runner
from .guard import forget_returned_forwards
from .ops import QuantizableOp
from .saturation import SaturationGuard
from .scale_bank import ScaleBank
from .tap import TimestepTap

CALLBACK_KEY = "stepquant"


@dataclass
class QuantizedState:
    """What a quantized BaseModel carries as `stepquant`.

    base_model: {"name", "sha256"} of what was quantized. calibration: its summary.
    patches, backup: of the patcher that ComfyUI loaded last, kept for saving while it is loaded.
    patch_version: rises whenever a low-rank branch changes. hooks_reason: set while hooks change weights.
    kv_cache: of the cross-attention layers. scope: what a call's blocks share. Both None without fused blocks.
    runner: None if acceleration is off. saturation: None while the model is attached. scales: None without scale LoRAs.
    counted_bytes: of VRAM that ComfyUI was told of besides the weights.
    """

    recipe: Recipe
    base_model: dict[str, str | None]
    calibration: dict[str, object]
    tap: TimestepTap = field(default_factory=TimestepTap)
    patches: Mapping = field(default_factory=dict)
    backup: Mapping = field(default_factory=dict)
    acceleration: Acceleration = Acceleration.AUTO
    patch_version: int = 0
    hooks_reason: str | None = None
    kv_cache: Any = None
    scope: Any = None
    runner: UNetRunner | None = None
    saturation: SaturationGuard | None = None
    scales: ScaleBank | None = None
    counted_bytes: int = 0

    def weights_moved(self) -> None:
        if self.runner is not None:
            self.runner.invalidate()

    def run_ended(self) -> None:
        self.saturation.end_run()
        if self.runner is not None:
            self.runner.residency.let_go()

    def unloaded(self) -> None:
        self.saturation.unloaded()
        if self.kv_cache is not None:
            self.kv_cache.clear()
        if self.runner is not None:
            self.runner.release()


def state_of(patcher: ModelPatcher) -> QuantizedState | None:
    """The state of a MODEL that StepQuant quantized; None for any other."""
    return getattr(patcher.model, "stepquant", None)


def attach(
    patcher: ModelPatcher,
    recipe: Recipe,
    base_model: dict[str, str | None],
    calibration: dict[str, object],
    acceleration: Acceleration = Acceleration.AUTO,
) -> None:
    """Make the patcher's freshly built UNet one model: names, schemes, one tap, saving, callbacks (copied to clones)."""
    model = patcher.model
    model.stepquant = QuantizedState(recipe, base_model, calibration, acceleration=Acceleration(acceleration))
    model.stepquant.tap.follow(model.model_sampling)
    unet = model.diffusion_model
    for name, module in unet.named_modules():
        if isinstance(module, QuantizableOp):
            module.layer_name = name
            module.scheme = recipe.schemes.get(name, module.scheme)
            module.tap = model.stepquant.tap
    unet.time_embed[0].observes_timestep = True
    model.stepquant.saturation = SaturationGuard(unet, recipe.saturation_limit)
    saturation.watch(patcher)
    if model.stepquant.acceleration is not Acceleration.OFF:
        blocks.bind(unet, model.stepquant)
        kv_cache.watch(patcher)
        model.stepquant.runner = bind_runner(unet, model.stepquant)
    bind_dense_saving(model)
    set_attention(patcher, recipe.attention)
    for call, function in (
        (CallbacksMP.ON_LOAD, _on_load),
        (CallbacksMP.ON_PRE_RUN, _on_pre_run),
        (CallbacksMP.ON_CLEANUP, _on_cleanup),
        (CallbacksMP.ON_DETACH, _on_detach),
        (CallbacksMP.ON_APPLY_HOOKS, lora.on_apply_hooks),
    ):
        patcher.remove_callbacks_with_key(call, CALLBACK_KEY)
        patcher.add_callback_with_key(call, CALLBACK_KEY, function)


def _on_load(patcher: ModelPatcher, *_: object) -> None:
    lora.on_load(patcher)
    vram_account.start_count(patcher)


def _on_detach(patcher: ModelPatcher, unpatch_all: bool) -> None:
    lora.release(patcher, unpatch_all)
    vram_account.end_count(patcher, unpatch_all)


def _on_pre_run(patcher: ModelPatcher) -> None:
    forget_returned_forwards(patcher.model.diffusion_model)
    lora.reconcile(patcher)
    scale_lora.reconcile(patcher)
    patcher.model.stepquant.saturation.begin_run()


def _on_cleanup(patcher: ModelPatcher) -> None:
    patcher.model.stepquant.run_ended()
    vram_account.renew_count(patcher)


@contextmanager
def counting_macs(model: nn.Module) -> Iterator[MacCounter]:
    """Count the multiply-adds of a quantized BaseModel's quantizable layers while the block runs."""
    counter = MacCounter()
    layers = [m for m in model.modules() if isinstance(m, QuantizableOp) and is_quantizable(m.layer_name)]
    runner = getattr(getattr(model, "stepquant", None), "runner", None)
    with nullcontext() if runner is None else runner.paused("multiply-adds are being counted"):
        for layer in layers:
            layer.counter = counter
        try:
            yield counter
        finally:
            for layer in layers:
                layer.counter = None
