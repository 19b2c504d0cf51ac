"""Quantizes a MODEL that is already loaded, with whatever it carries, into a new one. The source is only read.

Weights stream through one layer at a time: source (where it is) -> float on the compute device, with the patches that
cannot run beside an int8 layer -> codes on the offload device. So peak VRAM is one float layer and, once it is sampled
with, the codes; peak RAM is source and codes.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import comfy.lora
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor, nn

from ...errors import ModelError
from ...quant.calibration import Calibration, describe
from ...quant.file_format import QuantizedLayer
from ...quant.layers import LayerSpec, check_is_sdxl, find_layers
from ...quant.recipe import Recipe, preset_recipe
from ...quant.weight import check_weight
from ..acceleration import Acceleration
from ..quantize_layer import check_calibrated, quantize_layer
from .attach import attach, state_of
from .lora import can_run_beside
from .ops import StepQuantOps

UNET = "diffusion_model."
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Source:
    """A patcher seen as tensors. weights: patch key -> (unpatched weight, function to make it float). patches: key -> patches."""

    patcher: ModelPatcher
    weights: Mapping[str, tuple[Tensor, Callable]]
    patches: Mapping[str, list]

    def float_weight(self, key: str, patches: list) -> Tensor:
        """fp32 on the compute device, patched."""
        weight, convert = self.weights[key]
        weight = convert(weight.to(self.patcher.load_device, copy=True), inplace=True).float()
        return comfy.lora.calculate_weight(patches, weight, key) if patches else weight

    def stored(self, key: str, dtype: torch.dtype) -> Tensor:
        """A copy, unpatched, in the model's dtype, on the offload device."""
        weight, _ = self.weights[key]
        return weight.to(device=self.patcher.offload_device, dtype=dtype, copy=True)


def quantizable_layers(model: ModelPatcher) -> dict[str, LayerSpec]:
    """The layers that a recipe for this MODEL may name. Raises ModelError if it is no SDXL or quantized already."""
    return _layers(_read(model))


def weight_reader(model: ModelPatcher) -> Callable[[str], Tensor]:
    """Reads a quantizable layer's weight by name, fp32 on the compute device: the one whose codes quantize_model would make."""
    source = _read(model)

    def read(name: str) -> Tensor:
        key = f"{UNET}{name}.weight"
        patches = source.patches.get(key, [])
        return source.float_weight(key, [] if can_run_beside(patches, source.weights[key][0].shape) else patches)

    return read


def quantize_model(
    model: ModelPatcher,
    recipe: Recipe | str,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    check_interrupt: Callable[[], None] = comfy.model_management.throw_exception_if_processing_interrupted,
    base_model: dict[str, str | None] | None = None,
    acceleration: Acceleration | str = Acceleration.AUTO,
) -> ModelPatcher:
    """A quantized MODEL that carries everything `model` does; `model` stays bit for bit what it was.

    Args:
        model: an SDXL, loaded or not. Plain LoRAs on it run beside the int8 layers; weights with any other patch are
            quantized with all their patches merged. Model options, object patches, wrappers, callbacks, hooks,
            injections and attachments are carried over.
        recipe: or the name of a preset.
        calibration: needed by recipes with static activations.
        progress: called with (layers done, layers in all). check_interrupt: called before each layer; may raise.
        base_model: {"name", "sha256"} for the file's header.
        acceleration: how much of the UNet runs as one piece.
    Raises: ModelError if `model` is no SDXL or cannot be followed; CalibrationError; WeightError naming the layer.
    """
    source = _read(model)
    layers = _layers(source)
    recipe = preset_recipe(recipe, layers) if isinstance(recipe, str) else recipe
    _check_recipe(recipe, layers, calibration)
    merged = _patches_to_merge(source, recipe)
    with torch.no_grad():
        built = _build(model)
        unet = built.diffusion_model
        for done, name in enumerate(recipe.schemes):
            check_interrupt()
            unet.get_submodule(name).layer_name = name
            unet.get_submodule(name).install(_quantize_layer(source, name, recipe, calibration, merged))
            if progress is not None:
                progress(done + 1, len(recipe.schemes))
        _copy_rest(source, unet, recipe)
    patcher = _carry_over(model, built, merged)
    summary = dict(describe(calibration)) if calibration is not None else {}
    attach(patcher, recipe, base_model or {"name": None, "sha256": None}, summary, Acceleration(acceleration))
    if model.cached_patcher_init is not None:
        patcher.cached_patcher_init = (rebuild, (model.cached_patcher_init, recipe, calibration, merged, base_model, acceleration))
    return patcher


def rebuild(
    source_init: tuple,
    recipe: Recipe,
    calibration: Calibration | None,
    merged: Mapping[str, list],
    base_model: dict[str, str | None] | None,
    acceleration: Acceleration | str = Acceleration.AUTO,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """Make a quantized MODEL again from its source's own initialiser: ComfyUI's cached_patcher_init."""
    source = source_init[0](*source_init[1], disable_dynamic=disable_dynamic)
    if len(source_init) > 2:
        source = source[source_init[2]]
    source.patches = {key: list(patches) for key, patches in merged.items()}
    return quantize_model(source, recipe, calibration, base_model=base_model, acceleration=acceleration)


def _read(model: ModelPatcher) -> _Source:
    """Raises ModelError unless the patcher holds an SDXL whose weights can be followed."""
    unet = getattr(model.model, "diffusion_model", None)
    if state_of(model) is not None:
        raise ModelError("Quantize: this model is already quantized by StepQuant. Connect the original model.")
    replaced = [name for name in model.object_patches if name.startswith(UNET.removesuffix("."))]
    if unet is None or replaced:
        found = f"its {replaced[0]} is replaced by another node" if replaced else "it has no diffusion model"
        raise ModelError(f"Quantize: this model cannot be quantized, {found}. Put Quantize before torch.compile and similar nodes.")
    with model.use_ejected():
        entries = model.get_key_patches(UNET)
    weights = {key: entry[0] for key, entry in entries.items()}
    check_is_sdxl({_layer_key(key): weight.shape for key, (weight, _) in weights.items()}, "Quantize: the model")
    for key, (weight, _) in weights.items():
        if isinstance(weight, QuantizedTensor):
            raise ModelError(f"Quantize: {_layer_key(key)} is already quantized ({weight._layout_cls}). Connect the fp16 model.")
    return _Source(model, weights, {key: entry[1:] for key, entry in entries.items() if len(entry) > 1})


def _layers(source: _Source) -> dict[str, LayerSpec]:
    return find_layers({_layer_key(key): weight.shape for key, (weight, _) in source.weights.items()})


def _layer_key(key: str) -> str:
    return key.removeprefix(UNET)


def _check_recipe(recipe: Recipe, layers: Mapping[str, LayerSpec], calibration: Calibration | None) -> None:
    unknown = [name for name in recipe.schemes if name not in layers]
    if unknown:
        raise ModelError(f"Quantize: the recipe has {unknown[0]}, which this model has not. Make a recipe for this model.")
    check_calibrated(recipe, calibration)


def _patches_to_merge(source: _Source, recipe: Recipe) -> dict[str, list]:
    """Weights that become codes and have a patch that cannot run beside them. All their patches: their order matters."""
    keys = (f"{UNET}{name}.weight" for name in recipe.schemes)
    patched = {key: source.patches[key] for key in keys if key in source.patches}
    return {key: patches for key, patches in patched.items() if not can_run_beside(patches, source.weights[key][0].shape)}


def _build(model: ModelPatcher) -> nn.Module:
    """An empty BaseModel of the source's class and configuration, with our operations; int8 layers have no weights yet."""
    original = model.model
    dtype = original.get_dtype_inference()
    config = type(original.model_config)(original.model_config.unet_config)
    # copy.copy fails on these: they answer None to every unknown attribute.
    vars(config).update(vars(original.model_config))
    config.unet_config = {**original.model_config.unet_config, "dtype": dtype}
    config.custom_operations, config.quant_config = StepQuantOps, None
    config.manual_cast_dtype = None
    built = type(original)(config, model_type=original.model_type, device=model.offload_device)
    if original.concat_keys:
        built.set_inpaint()
        built.concat_keys = original.concat_keys
    return built


def _quantize_layer(
    source: _Source, name: str, recipe: Recipe, calibration: Calibration | None, merged: Mapping[str, list]
) -> QuantizedLayer:
    """On the offload device; quantized on the compute device."""
    key, bias_key = f"{UNET}{name}.weight", f"{UNET}{name}.bias"
    weight = source.float_weight(key, merged.get(key, []))
    bias = source.stored(bias_key, source.patcher.model.get_dtype_inference()) if bias_key in source.weights else None
    layer = quantize_layer(name, weight, bias, recipe.schemes[name], recipe.groups_of(name), calibration)
    offload = source.patcher.offload_device
    return QuantizedLayer(**{part: None if tensor is None else tensor.to(offload) for part, tensor in vars(layer).items()})


def _copy_rest(source: _Source, unet: nn.Module, recipe: Recipe) -> None:
    """Everything that stays 16 bit, in the source's values."""
    dtype = source.patcher.model.get_dtype_inference()
    ours = {f"{UNET}{name}.{part}" for name in recipe.schemes for part in ("weight", "bias")}
    rest = {_layer_key(key): source.stored(key, dtype) for key in source.weights if key not in ours}
    for name, tensor in rest.items():
        check_weight(tensor, name.removesuffix(".weight"))
    unet.load_state_dict(rest, strict=False, assign=True)


def _carry_over(model: ModelPatcher, built: nn.Module, merged: Mapping[str, list]) -> ModelPatcher:
    """A patcher of the new model with everything the source's has: ComfyUI's own clone, given another model."""
    with model.use_ejected():
        patcher = model.clone(model_override=(built, ({}, {}, {}, set())))
    patcher.patches = {key: patches for key, patches in patcher.patches.items() if key not in merged}
    # Another model from here on: nothing that ComfyUI knows of the source's weights holds for it.
    patcher.patches_uuid, patcher.clone_base_uuid, patcher.parent = uuid.uuid4(), uuid.uuid4(), None
    patcher.size = 0
    patcher.hook_backup, patcher.cached_hook_patches, patcher.current_hooks = {}, {}, None
    patcher.is_injected = False
    patcher.remove_additional_models("multigpu")
    return patcher
