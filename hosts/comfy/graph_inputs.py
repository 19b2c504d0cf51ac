"""What a UNet call is given, as tensors: their shapes as a key, and buffers that stay where they are for a CUDA graph to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

NAMES = ("x", "timesteps", "context", "y")


@dataclass
class UNetCall:
    """Arguments of ComfyUI's UNetModel._forward.

    x: (B, C, H, W). timesteps: (B,). context: (B, tokens, width). y: (B, adm). control: name -> residuals, or None.
    """

    x: Tensor
    timesteps: Tensor | None
    context: Tensor | None
    y: Tensor | None
    control: Mapping[str, list] | None
    transformer_options: dict[str, Any]
    others: Mapping[str, Any]

    def tensors(self) -> list[Tensor]:
        """Every tensor of the call, always in the same order."""
        residuals = [residual for name in sorted(self.control or ()) for residual in self.control[name]]
        return [tensor for tensor in [*(getattr(self, name) for name in NAMES), *residuals] if tensor is not None]

    @cached_property
    def layout(self) -> tuple:
        """Equal for two calls if the buffers of one can take the other's tensors."""
        given = tuple(_describe(getattr(self, name)) for name in NAMES)
        return *given, *((name, *map(_describe, self.control[name])) for name in sorted(self.control or ()))


class StaticInputs:
    """A call's tensors in buffers of their own. `call` reads them; its control lists are new ones, since the UNet empties them."""

    def __init__(self, call: UNetCall) -> None:
        # Plain tensors: one born in inference mode could not be refilled outside of it.
        with torch.inference_mode(False):
            self._buffers = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in call.tensors()]
        waiting = iter(self._buffers)
        given = {name: next(waiting) if getattr(call, name) is not None else None for name in NAMES}
        self._given = given
        self._control = call.control and {
            name: [None if residual is None else next(waiting) for residual in call.control[name]] for name in sorted(call.control)
        }

    def load(self, call: UNetCall) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._buffers, call.tensors())

    def call(self, transformer_options: Mapping[str, Any]) -> UNetCall:
        control = self._control and {name: list(residuals) for name, residuals in self._control.items()}
        return UNetCall(**self._given, control=control, transformer_options=dict(transformer_options), others={})


def _describe(tensor: Tensor | None) -> tuple | None:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)
