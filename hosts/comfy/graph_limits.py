"""When a UNet call cannot run as a CUDA graph: a replay skips Python, so nobody else's Python may be in the call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType
from typing import Any

import torch
from comfy.ldm.modules import attention
from torch import Tensor, nn
from torch.nn import functional

from ...kernels.recording import hides_addresses
from .graph_inputs import NAMES, UNetCall
from .kv_cache import OPTION

# What ComfyUI and the K/V cache put into transformer_options and the UNet either only passes on or sets itself. Wrappers
# run around the UNet, not in it; callbacks belong to the patcher.
HARMLESS_OPTIONS = {
    OPTION, "cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "wrappers", "callbacks", "original_shape", "transformer_index",
    "activations_shape", "block", "block_index", "prefetch_dynamic_vbars", "multigpu_thread_device",
}  # fmt: skip


def unsuitable(call: UNetCall) -> str | None:
    """Why this call must run layer by layer; None if nothing speaks against a graph."""
    for name, value in call.transformer_options.items():
        if name not in HARMLESS_OPTIONS and _has_content(value):
            return f"another node works inside the UNet ({_inside(name, value)})"
    for name, value in call.others.items():
        if value is not None:
            return f"the UNet is given an extra input ({name})"
    if any(not isinstance(getattr(call, name), Tensor) for name in NAMES):
        return "the UNet is called without timesteps, context or y"
    residuals = [residual for group in (call.control or {}).values() for residual in group]
    if any(residual is not None and not isinstance(residual, Tensor) for residual in residuals):
        return "a ControlNet gives something other than tensors"
    tensors = call.tensors()
    if any(tensor.device != call.x.device for tensor in tensors):
        return "the UNet's inputs lie on several devices"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients are wanted"
    return None


def foreign_attention() -> str | None:
    """Why another pack's attention keeps a call from being recorded; None if it does not."""
    stock = attention.optimized_attention is attention.attention_pytorch and isinstance(
        functional.scaled_dot_product_attention, BuiltinFunctionType
    )
    if stock or not hides_addresses():
        return None
    # Its Triton kernels would fail in a recording under cudaMallocAsync, which ends the process.
    return "attention is not PyTorch's own; start ComfyUI with --disable-cuda-malloc to have graphs with it"


def _has_content(value: Any) -> bool:
    """Whether an option can do anything: {"attn1_patch": []} cannot."""
    if isinstance(value, Mapping):
        return any(map(_has_content, value.values()))
    if isinstance(value, list | tuple):
        return bool(value)
    return value is not None


def _inside(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{name}: " + ", ".join(str(key) for key, part in value.items() if _has_content(part))
    return name


class ForeignCode:
    """Notices hooks and replaced forwards on a UNet's modules, at the cost of looking into dicts that are known."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._attributes = [vars(module) for module in modules]
        self._known = self._forwards()

    def present(self) -> str | None:
        if any(self._hooks):
            return "a hook watches the UNet's layers"
        if self._forwards() != self._known:
            return "another node has replaced a layer's forward"
        return None

    def _forwards(self) -> list:
        return [attributes.get("forward") for attributes in self._attributes]
