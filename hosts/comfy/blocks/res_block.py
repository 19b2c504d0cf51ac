"""ResBlock on fused layers. A skip that its input is joined with is read where it lies (joined.py).

GroupNorm, SiLU and quantization are one pass; the time embedding and the residual are added by the convolutions.
"""

from __future__ import annotations

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor, nn

from ..guard import Guard, Unowned, is_stock
from .call_scope import CallScope
from .joined import parts_of, plain
from .layers import ActivatedConv, AddedLinear, JoinedConv


class FusedResBlock:
    """Bound to ResBlock."""

    def __init__(self, block: ResBlock, scope: CallScope) -> None:
        self._block, self._scope = Unowned(block), scope
        self._embedding = AddedLinear(block.emb_layers[1])
        self._first = ActivatedConv(block.in_layers[0], block.in_layers[2])
        self._second = ActivatedConv(block.out_layers[0], block.out_layers[3])
        self._skip = None if isinstance(block.skip_connection, nn.Identity) else block.skip_connection
        self._joined_skip = JoinedConv(self._skip) if isinstance(self._skip, nn.Conv2d) else None
        self._guard = Guard(block, (ResBlock,))
        self._inner = ResBlock._forward

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether this is SDXL's ResBlock: 2D, the embedding added, no resampling, no dropout, no checkpointing."""
        return (
            type(block) is ResBlock
            and is_stock(ResBlock)
            and ResBlock._forward.__module__ == ResBlock.__module__
            and not (block.updown or block.use_scale_shift_norm or block.skip_t_emb or block.exchange_temb_dims or block.use_checkpoint)
            and block.dropout == 0
            and [type(each) for each in block.emb_layers[:1]] == [nn.SiLU]
            and all(isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) for conv in (block.in_layers[2], block.out_layers[3]))
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        block = self._block()
        if (
            torch.compiler.is_compiling()
            or x.ndim != 4
            or emb.ndim != 2
            or emb.shape[0] != x.shape[0]
            or ResBlock._forward is not self._inner
            or self._guard.is_foreign()
        ):
            return type(block).forward(block, plain(x), emb)
        comfy.ops.run_every_op()
        bucket = self._scope.bucket(x.device)
        embedding = self._embedding(self._scope.activated(emb), None, bucket)
        if self._joined_skip is None:
            x, other = plain(x), None
        else:
            x, other = parts_of(x)
        h = self._first(x, embedding, bucket, other)
        if other is not None:
            x = self._joined_skip(x, other, bucket)
        elif self._skip is not None:
            x = self._skip(x)
        return self._second(h, x, bucket)
