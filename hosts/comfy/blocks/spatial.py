"""SpatialTransformer on fused layers: GroupNorm into proj_in, the residual into proj_out. The blocks between bind themselves."""

from __future__ import annotations

import comfy.ops
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from torch import Tensor, nn

from ..guard import Guard, Unowned, is_stock
from .call_scope import CallScope
from .layers import AddedLinear, GroupNormedLinear


class FusedSpatialTransformer:
    """Bound to SpatialTransformer. Images stay channels_last, so that pixels are rows without a copy."""

    def __init__(self, block: SpatialTransformer, scope: CallScope) -> None:
        self._block, self._scope = Unowned(block), scope
        self._entrance = GroupNormedLinear(block.norm, block.proj_in)
        self._exit = AddedLinear(block.proj_out)
        self._guard = Guard(block, (SpatialTransformer,), ("norm", "proj_in", "proj_out", "transformer_blocks"))

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether this is SDXL's: Linear projections."""
        return type(block) is SpatialTransformer and is_stock(SpatialTransformer) and block.use_linear

    def forward(self, x: Tensor, context: Tensor | list | None = None, transformer_options: dict | None = None) -> Tensor:
        block, options = self._block(), {} if transformer_options is None else transformer_options
        if torch.compiler.is_compiling() or x.ndim != 4 or self._guard.is_foreign():
            return type(block).forward(block, x, context=context, transformer_options=options)
        comfy.ops.run_every_op()
        B, C, H, W = x.shape
        bucket = self._scope.bucket(x.device)
        contexts = context if isinstance(context, list) else [context] * len(block.transformer_blocks)
        options["activations_shape"] = list(x.shape)  # patches read it
        tokens = self._entrance(x, bucket)
        for index, inner in enumerate(block.transformer_blocks):
            options["block_index"] = index
            tokens = inner(tokens, context=contexts[index], transformer_options=options)
        if tokens.shape[:2] != (B, H * W):  # a patch has changed the batch: the sum broadcasts
            return block.proj_out(tokens).reshape(tokens.shape[0], H, W, C).movedim(3, 1) + x
        y = self._exit(tokens, x.permute(0, 2, 3, 1).reshape(B, H * W, C), bucket)
        return y.view(B, H, W, C).permute(0, 3, 1, 2)
