"""Brings the quantized layers in line with a patcher's patches: low-rank ones beside the layer, the others merged.

A merge would quantize the patched weight anew and lose what the rounding was chosen for; a low-rank LoRA beside the
layer is exact (2.5e-6 against 2.3e-3 of the sample). So stock LoraLoader needs no node of ours. ComfyUI calls
`reconcile` at the end of every load and before every run: in between it may have added merge patches of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import comfy.lora
import torch
from comfy.hooks import HookGroup
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor, nn

from ..low_rank import LowRankBranch
from .ops import QuantizableOp

HOOKS_CHANGE_WEIGHTS = "hooks change the weights between the calls of one step"
Patch = tuple  # ComfyUI's: (strength, adapter or value, strength of the model, offset, function)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizableOp]]:
    """(patch key of the weight, layer) of every quantized layer of a BaseModel."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizableOp) and module.is_quantized:
            yield f"{name}.weight", module


def can_run_beside(patches: Sequence[Patch], shape: Sequence[int]) -> bool:
    """Whether all patches of a weight are plain LoRAs of its shape: only then does a branch equal the merge."""
    return all(_is_plain_lora(patch, shape) for patch in patches)


def _is_plain_lora(patch: Patch, shape: Sequence[int]) -> bool:
    _, adapter, strength_model, offset, function = patch
    if type(adapter) is not LoRAAdapter or strength_model != 1.0 or offset is not None or function is not None:
        return False
    up, down, _, mid, dora_scale, reshape = adapter.weights
    inputs = torch.Size(shape[1:]).numel()
    fits = up.shape[0] == shape[0] and down.flatten(1).shape[1] == inputs and up.numel() == shape[0] * down.shape[0]
    return fits and mid is None and dora_scale is None and reshape is None


def make_branch(patches: Sequence[Patch], shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> LowRankBranch:
    """One branch for all of them. `shape` is the weight's, OIHW for a conv; the factors may be stored flattened."""
    downs, ups = [], []
    for strength, adapter, *_ in patches:
        up, down, alpha = adapter.weights[:3]
        factor = strength * (alpha / down.shape[0] if alpha is not None else 1.0)
        downs.append(down.to(device).float().flatten(1))
        ups.append(up.to(device).float().flatten(1) * factor)
    down, up = torch.cat(downs), torch.cat(ups, 1)
    if len(shape) == 4:
        down, up = down.view(-1, *shape[1:]), up.view(*up.shape, 1, 1)
    return LowRankBranch(down.to(dtype), up.to(dtype))


def on_load(patcher: ModelPatcher, *_: object) -> None:
    """ON_LOAD: weights have moved."""
    reconcile(patcher)
    patcher.model.stepquant.weights_moved()


def reconcile(patcher: ModelPatcher) -> None:
    """ON_PRE_RUN, and part of ON_LOAD. Costs a walk over the modules if nothing has changed."""
    device, dtype = patcher.load_device, patcher.model.get_dtype_inference()
    state = patcher.model.stepquant
    state.tap.follow(patcher.model.model_sampling)
    state.patches, state.backup = patcher.patches, patcher.backup
    _note_hooks(patcher)
    for key, module in quantized_layers(patcher.model):
        patches = patcher.patches.get(key, [])
        # Patchers that update weights in place have merged the patch already.
        if not patches or patcher.weight_inplace_update or not can_run_beside(patches, module.weight.shape):
            state.patch_version += module.branch is not None
            module.branch, module.branch_patches = None, None
            _merge(patcher, key, module, patches)
            continue
        if not _same(module.branch_patches, patches) or module.branch.down.device != device:
            module.branch = make_branch(patches, module.weight.shape, device, dtype)
            module.branch_patches = list(patches)
            state.patch_version += 1
        _forget_merge_patches(module)


def release(patcher: ModelPatcher, unpatch_all: bool) -> None:
    """ON_DETACH. A clone that is only being deleted passes False: the model may be in use by another."""
    if not unpatch_all:
        return
    state = patcher.model.stepquant
    state.patches, state.backup = {}, {}
    state.patch_version += 1
    state.unloaded()
    for _, module in quantized_layers(patcher.model):
        module.branch, module.branch_patches, module.merged = None, None, None


def on_apply_hooks(patcher: ModelPatcher, hooks: HookGroup | None) -> None:
    """ON_APPLY_HOOKS. Weights change between the calls of one step, and every switch of hook groups merges into the codes
    anew, as EnumHookMode.MinVram does.

    With MaxSpeed ComfyUI caches the merged weights as floats and copies them into the live weight, which a
    QuantizedTensor refuses; and copies of codes would overwrite the backup too, since in inference mode
    QuantizedTensor.to(copy=True) returns the tensor itself (comfy_kitchen 0.2.31).
    """
    patcher.cached_hook_patches.pop(hooks, None)
    _note_hooks(patcher)
    patcher.model.stepquant.weights_moved()


def _note_hooks(patcher: ModelPatcher) -> None:
    patcher.model.stepquant.hooks_reason = None if patcher.current_hooks is None else HOOKS_CHANGE_WEIGHTS


def _merge(patcher: ModelPatcher, key: str, module: QuantizableOp, patches: Sequence[Patch]) -> None:
    """Quantize the patched weight anew, where ComfyUI's load has put the patch into the weight (it left a backup).

    Elsewhere the patch is applied when the weight is fetched: as a weight function in low VRAM, on faulting in dynamic VRAM.
    """
    backup = patcher.backup.get(key)
    if not patches or backup is None or backup.inplace_update or any(map(_is_merge_patch, module.weight_function)):
        return
    if module.merged is not None and module.merged[0] is module.weight and _same(module.merged[1], patches):
        return
    weight = backup.weight.to(module.weight.device).dequantize().float()
    module.requantize(comfy.lora.calculate_weight(patches, weight, key))
    module.merged = (module.weight, list(patches))


def _forget_merge_patches(module: QuantizableOp) -> None:
    module.weight_function = [function for function in module.weight_function if not _is_merge_patch(function)]
    if getattr(module, "weight_lowvram_function", None) is not None:
        module.weight_lowvram_function = None


def _is_merge_patch(function: object) -> bool:
    return getattr(function, "is_lowvram_patch", False)


def _same(known: Sequence[Patch] | None, patches: Sequence[Patch]) -> bool:
    return known is not None and len(known) == len(patches) and all(a is b for a, b in zip(known, patches, strict=True))


def dense_weight(weight: Tensor, patches: Sequence[Patch], key: str) -> Tensor:
    """fp32 weight that codes and patches amount to: what a stock file stores."""
    dense = weight.dequantize().float()
    return comfy.lora.calculate_weight(patches, dense, key) if patches else dense
