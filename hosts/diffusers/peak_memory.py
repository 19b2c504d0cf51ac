"""Measures the most memory that tensors hold at once during a call. Leaves out the interpreter and the libraries."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .quantize import weight_bytes
from .trajectory import UNetCall, map_tensors


def peak_activation_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Run `call` and return the peak of what it allocated beyond what was there before, in bytes.

    On CUDA the allocator's own figure; on a CPU every tensor's storage from creation to release, which is exact
    and repeatable where a process's resident size is neither.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _StorageMeter() as meter:
        call()
    return meter.peak_bytes


def unet_peak_bytes(unet: nn.Module, call: UNetCall) -> int:
    """What the UNet takes to make one picture with guidance: its weights, and the most that one call holds beside them.

    The weights count as a file holds them, 16 bit where they are not quantized, although a CPU may have them in fp32;
    activations count as they are computed here.
    """
    device = next(unet.parameters()).device
    # Two samples: one picture with and without the prompt. Values do not matter for memory.
    arguments = map_tensors(call.arguments, lambda tensor: (tensor[:2] if tensor.ndim else tensor).to(device))
    with torch.inference_mode():
        activations = peak_activation_bytes(lambda: unet(**arguments, return_dict=False), device)
    return weight_bytes(copy.deepcopy(unet).half()) + activations


class _StorageMeter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # A storage that arrives as an input existed before the call, unless it was met as an output already.
        before = {tensor.untyped_storage()._cdata for tensor in inputs}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in before:
                self._track(leaf.untyped_storage())
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live_bytes -= size
