"""Scale LoRAs on a quantized MODEL: a clone carries them, and the live model is brought in line with its patcher before every run.

The multiplication is in scale_bank.py, training in tune.py, files in quant/tuning/scale_file.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...errors import ModelError
from ...quant.tuning.identity import check_identity
from ...quant.tuning.scale_set import ScaleSet, is_scaled_norm
from .ops import QuantizableOp
from .scale_bank import ScaleBank, Stack

ATTACHMENT = "stepquant_scales"  # of a ModelPatcher, copied to its clones
UNET = "diffusion_model."


def with_scale_lora(model: ModelPatcher, scales: ScaleSet, strength: float, file: str) -> ModelPatcher:
    """A clone of the MODEL that runs with one scale set more; `model` is left as it is.

    Args: strength: what the logarithms of the factors are multiplied with. file: name for error messages.
    Raises: ModelError if the MODEL is not quantized, is not the one the set was tuned on, or keeps a layer of it in 16 bit.
    """
    state = getattr(model.model, "stepquant", None)
    if state is None:
        raise ModelError(f"{file}: a scale LoRA needs a quantized model. Put Quantize SDXL (StepQuant) or Load quantized before it.")
    unet = model.model.diffusion_model
    check_identity(scales.base, reader(model), state.base_model, file)
    check_layers(unet, scales, file)
    clone = model.clone()
    clone.set_attachments(ATTACHMENT, (*stack_of(model), (scales, strength)))
    return clone


def stack_of(patcher: ModelPatcher) -> Stack:
    """The scale sets that a MODEL carries, the first one loaded first."""
    return patcher.attachments.get(ATTACHMENT, ())


def check_layers(unet: nn.Module, scales: ScaleSet, file: str) -> None:
    """Raise ModelError naming the first layer of the set that this UNet cannot scale."""
    layers, norms = dict(quantized_layers(unet)), dict(scaled_norms(unet))
    for name, table in scales.out.items():
        if name not in layers or layers[name].weight.shape[0] != table.shape[1]:
            found = "not quantized" if name not in layers else f"of {layers[name].weight.shape[0]} channels"
            raise ModelError(
                f"{file}: {name} is {found} in this model; the scale LoRA was tuned with it quantized, of {table.shape[1]} channels. "
                "Quantize the model with the preset or recipe it was tuned with."
            )
    for name, table in scales.into.items():
        if name not in norms or norms[name].weight.shape[0] != table.shape[1]:
            raise ModelError(f"{file}: this model has no norm {name} of {table.shape[1]} channels. Connect the model that it was tuned on.")


def reconcile(patcher: ModelPatcher) -> None:
    """ON_PRE_RUN: let the live model use what this patcher carries. Costs a comparison if nothing has changed."""
    state, stack = patcher.model.stepquant, stack_of(patcher)
    if (() if state.scales is None else state.scales.stack) == stack:
        return
    bank = ScaleBank(stack, patcher.load_device) if stack else None
    unet = patcher.model.diffusion_model
    for name, module in (*quantized_layers(unet), *scaled_norms(unet)):
        module.scales = bank if bank is not None and name in bank else None
        module.layer_name = name
    state.scales = state.tap.scales = bank
    state.patch_version += 1
    if state.kv_cache is not None:
        state.kv_cache.clear()
    if state.runner is not None:
        state.runner.residency.clear()


def quantized_layers(unet: nn.Module) -> Iterator[tuple[str, QuantizableOp]]:
    """(name in the UNet, layer) of every quantized layer."""
    return ((name, module) for name, module in unet.named_modules() if isinstance(module, QuantizableOp) and module.is_quantized)


def scaled_norms(unet: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name in the UNet, norm) of every norm that can have factors."""
    norms = (nn.LayerNorm, nn.GroupNorm)
    return ((name, module) for name, module in unet.named_modules() if isinstance(module, norms) and is_scaled_norm(name))


def reader(model: ModelPatcher) -> Callable[[str], Tensor]:
    """Reads an unquantized weight by its name in the UNet, without patches, wherever ComfyUI keeps it."""
    state_dict = model.model_state_dict(UNET)

    def read(name: str) -> Tensor:
        backup = model.backup.get(UNET + name)
        return state_dict[UNET + name] if backup is None else backup.weight

    return read
