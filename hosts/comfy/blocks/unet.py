"""The UNet's own call: opens and closes what its blocks share. The loop over the blocks and its wrappers stay ComfyUI's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..guard import Unowned
from ..kv_cache import CrossAttentionCache
from . import attention
from .call_scope import CallScope


class ScopedUNet:
    """Bound to UNetModel as `forward`, around ComfyUI's wrappers and around what runs the UNet (graph.py)."""

    def __init__(self, unet: nn.Module, scope: CallScope, cache: CrossAttentionCache) -> None:
        self._unet, self._scope, self._cache = Unowned(unet), scope, cache

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: dict | None = None,
        transformer_options: dict | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = {} if transformer_options is None else transformer_options
        return _call(self, (x, timesteps, context, y, control, options), kwargs)

    def call(self, x: Tensor, *inputs: Any, **kwargs: Any) -> Tensor:
        """`forward`, with everything positional up to transformer_options."""
        unet, options = self._unet(), inputs[-1]
        stock, arguments = type(unet).forward, (unet, x, *inputs)
        self._scope.open(attention.prefers_cudnn(x, options), options)
        try:
            return stock(*arguments, **kwargs)
        finally:
            self._scope.close()
            self._cache.close()


@torch.compiler.disable(reason="StepQuant runs its own kernels and CUDA graph; set acceleration to off for torch.compile to trace the UNet")
def _call(unet: ScopedUNet, inputs: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Out of torch.compile's sight. Traced, the UNet would run layer by layer: no fused blocks, no graph, minutes of compiling.

    Not a decorated method: a copied UNet's must be of the copy.
    """
    return unet.call(*inputs, **kwargs)
