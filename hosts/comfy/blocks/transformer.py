"""BasicTransformerBlock and FeedForward on fused layers. Steps aside for everything that patches either."""

from __future__ import annotations

import comfy.ops
import torch
from comfy.ldm.modules.attention import GEGLU, BasicTransformerBlock, CrossAttention, FeedForward
from torch import Tensor, nn

from ...fused_transformer import TransformerTensors, transformer_block
from ..guard import Guard, Unowned, is_stock
from ..kv_cache import CrossAttentionCache
from .attention import attend, is_torch_attention
from .call_scope import CallScope
from .layers import AddedLinear, GatedLinears, NormedLinears, WrittenOut

# What BasicTransformerBlock hands its tensors to, in transformer_options["patches"].
PATCHES = {"attn1_patch", "attn1_output_patch", "middle_patch", "attn2_patch", "attn2_output_patch"}


class FusedFeedForward:
    """Bound to FeedForward: what a block that has stepped aside still gains."""

    def __init__(self, block: FeedForward, scope: CallScope) -> None:
        self._block, self._scope = Unowned(block), scope
        self._projection = block.net[0].proj
        self._second = AddedLinear(block.net[2])
        self._guard = Guard(block, (FeedForward, GEGLU))

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether this is SDXL's feed-forward: GEGLU, no dropout, a Linear."""
        return (
            type(block) is FeedForward
            and is_stock(FeedForward, GEGLU)
            and len(block.net) == 3
            and type(block.net[0]) is GEGLU
            and _is_idle(block.net[1])
        )

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or self._guard.is_foreign():
            block = self._block()
            return type(block).forward(block, x)
        comfy.ops.run_every_op()
        return self._second.after_geglu(self._projection(x), None, self._scope.bucket(x.device))


class FusedTransformerBlock:
    """Bound to BasicTransformerBlock: each norm quantizes for the layers after it, each residual is added by the layer before it."""

    def __init__(self, block: BasicTransformerBlock, name: str, scope: CallScope, cache: CrossAttentionCache) -> None:
        """name: the block's in the UNet."""
        self._block, self._scope, self._cache = Unowned(block), scope, cache
        self._norm = block.norm1
        self._heads, self._precision = block.attn1.heads, block.attn1.attn_precision
        own, cross, feed_forward = block.attn1, block.attn2, block.ff.net
        self._own_inputs = NormedLinears(block.norm1, [own.to_q, own.to_k, own.to_v])
        self._own_output = AddedLinear(own.to_out[0])
        self._cross_name, self._cross = f"{name}.attn2", cross
        self._query = NormedLinears(block.norm2, [cross.to_q])
        self._cross_output = AddedLinear(cross.to_out[0])
        self._feed_forward = GatedLinears(block.norm3, feed_forward[0].proj, feed_forward[2])
        self._written_out = WrittenOut([own.to_q, own.to_k, own.to_v, own.to_out[0], cross.to_q, cross.to_out[0]])
        self._guard = Guard(block, (BasicTransformerBlock, CrossAttention, FeedForward, GEGLU))

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether this is SDXL's block: self-attention, cross-attention on the prompt, feed-forward, no dropout."""
        return (
            type(block) is BasicTransformerBlock
            and is_stock(BasicTransformerBlock, CrossAttention)
            and not block.ff_in
            and block.is_res
            and not block.disable_self_attn
            and not block.switch_temporal_ca_to_sa
            and type(block.attn1) is type(block.attn2) is CrossAttention
            and FusedFeedForward.fits(block.ff)
            and all(len(each.to_out) == 2 and _is_idle(each.to_out[1]) for each in (block.attn1, block.attn2))
        )

    def forward(self, x: Tensor, context: Tensor | None = None, transformer_options: dict | None = None) -> Tensor:
        options = {} if transformer_options is None else transformer_options
        if torch.compiler.is_compiling() or self._steps_aside(x, context, options):
            block = self._block()
            return type(block).forward(block, x, context=context, transformer_options=options)
        comfy.ops.run_every_op()
        bucket = self._scope.bucket(x.device)
        if (whole := self._whole(x, bucket, options)) is not None:
            k, v = self._prompt(context)
            return transformer_block(x, k, v, whole)
        *inputs, own_output, query, cross_output = self._written_out(x)
        # What is not needed any more is let go of: at 1024x1024 each of these is 10 MiB, and the feed-forward needs most memory.
        y = attend(*self._own_inputs(x, bucket, inputs), self._heads, self._precision, options, self._scope.cudnn_first)
        x = self._own_output(y, x, bucket, own_output)
        k, v = self._prompt(context)
        y = attend(*self._query(x, bucket, [query]), k, v, self._heads, self._precision, options, self._scope.cudnn_first)
        x = self._cross_output(y, x, bucket, cross_output)
        del y, inputs, own_output, query, cross_output
        return self._feed_forward(x, x, bucket)

    def _prompt(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt's keys and values."""
        return self._cache.lookup(self._cross_name) or (self._cross.to_k(context), self._cross.to_v(context))

    def _whole(self, x: Tensor, bucket: Tensor, options: dict) -> TransformerTensors | None:
        """All weights, if the block can run in one piece; gathered once for all calls in which they are the same.

        Kept with the weights that residency.py lends, and so let go of with them.
        """
        resident, standing = self._norm.resident, self._scope.standing
        if standing is None or resident is None or not is_torch_attention(options):
            return None
        standing = (standing, id(bucket), x.shape, x.dtype)
        if resident.standing != standing:
            resident.standing, resident.block = standing, (bucket, self._gather(x, bucket))
        return resident.block[1]

    def _gather(self, x: Tensor, bucket: Tensor) -> TransformerTensors | None:
        layers = self._own_inputs, self._own_output, self._query, self._cross_output, self._feed_forward
        parts = [layer.held(x, bucket) for layer in layers]
        return None if None in parts else TransformerTensors(*parts, self._heads, self._written_out.possible)

    def _steps_aside(self, x: Tensor, context: Tensor | None, options: dict) -> bool:
        patches, replaced = options.get("patches"), options.get("patches_replace")
        return (
            x.ndim != 3
            or context is None
            or context.ndim != 3
            or bool(patches and not PATCHES.isdisjoint(patches))
            or bool(replaced and self._is_replaced(replaced, options))
            or self._guard.is_foreign()
        )

    def _is_replaced(self, replaced: dict, options: dict) -> bool:
        block = options.get("block")
        places = (block, None if block is None else (block[0], block[1], options.get("block_index", 0)))
        return any(place in replaced.get(kind, ()) for kind in ("attn1", "attn2") for place in places)


def _is_idle(dropout: nn.Module) -> bool:
    return type(dropout) is nn.Dropout and dropout.p == 0
