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
        unet = self._unet()
        stock, arguments = type(unet).forward, (unet, x, timesteps, context, y, control, options)
        if torch.compiler.is_compiling():
            return stock(*arguments, **kwargs)
        cudnn_first = attention.prefers_cudnn(x, options)
        self._scope.open(cudnn_first, options)
        try:
            if not cudnn_first:
                return stock(*arguments, **kwargs)
            with attention.cudnn_first():
                return stock(*arguments, **kwargs)
        finally:
            self._scope.close()
            self._cache.close()
