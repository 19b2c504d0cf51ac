"""A whole transformer block of SDXL on held weights: one operation, whose launches and attention are repeated in a row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.nn import functional

from ..kernels import dispatch
from ..kernels.dispatch import Kept, Repeated, StaticScale
from .compute import LayerTensors
from .fused import NormTensors, added_product, feed_forward, normed_products, product, written_out


@dataclass(frozen=True)
class Normed:
    """A LayerNorm and the Linears that read its result. static: their common stored scale, None for scales per token."""

    norm: NormTensors
    static: StaticScale | None
    layers: tuple[LayerTensors, ...]


@dataclass(frozen=True)
class Added:
    """A Linear whose result is added to a residual. static: its input's stored scale."""

    static: StaticScale | None
    layer: LayerTensors


@dataclass(frozen=True)
class Gated:
    """LayerNorm, projection to values and gates, second Linear. statics: stored scales of both layers' inputs."""

    norm: NormTensors
    statics: tuple[StaticScale | None, StaticScale | None]
    projection: LayerTensors
    second: LayerTensors


@dataclass(frozen=True)
class TransformerTensors:
    """All of a block's weights, each where it stays while they are held.

    own: of q, k and v. query: of the prompt's q. heads: of both attentions. expands: whether all square Linears are 4-bit layers
        of one shape, whose weights are written out together where products do not unpack them.
    """

    own: Normed
    own_output: Added
    query: Normed
    cross_output: Added
    feed_forward: Gated
    heads: int
    expands: bool

    @cached_property
    def operands(self) -> tuple[Kept]:
        """See kernels/repeat.py."""
        parts = [getattr(part, name) for part in self._parts() for name in part.__dataclass_fields__]
        return (Kept(*parts, self.heads, self.expands),)

    def _parts(self) -> tuple[Normed, Added, Normed, Added, Gated]:
        return self.own, self.own_output, self.query, self.cross_output, self.feed_forward

    def square_layers(self, x: Tensor) -> list[LayerTensors]:
        """Of q, k, v, the first output, the prompt's q, the second output."""
        layers = [*self.own.layers, self.own_output.layer, *self.query.layers, self.cross_output.layer]
        K = x.shape[-1]
        return (self.expands and written_out(layers, x.numel() // K, K)) or layers


@Repeated
def transformer_block(x: Tensor, k: Tensor, v: Tensor, block: TransformerTensors) -> Tensor:
    """Self-attention, attention to the prompt, feed-forward, each added to x (B, T, C) -> (B, T, C). k, v: (B, S, C), the prompt's.

    Attention is torch's, by the algorithm that it chooses under the order in force, where there is no faster kernel for it.
    """
    *own, own_output, query, cross_output = block.square_layers(x)
    x = _attended(*normed_products(x, block.own.norm, block.own.static, own), block.heads, block.own_output, own_output, x)
    (q,) = normed_products(x, block.query.norm, block.query.static, [query])
    x = _attended(q, k, v, block.heads, block.cross_output, cross_output, x)
    last = block.feed_forward
    return feed_forward(x, last.norm, last.statics, last.projection, last.second, x)


def _attended(q: Tensor, k: Tensor, v: Tensor, heads: int, output: Added, layer: LayerTensors, residual: Tensor) -> Tensor:
    """Attention of q (B, T, C) to k and v (B, S, C), and the Linear that reads it, added to residual (B, T, C) -> (B, T, C)."""
    if not dispatch.has_attention(q, k, heads):
        return added_product(_by_torch(q, k, v, heads), output.static, layer, residual)
    if output.static is None:
        return added_product(dispatch.attention(q, k, v, heads), None, layer, residual)
    addend = residual.reshape(-1, residual.shape[-1]).contiguous()
    return product(dispatch.attention(q, k, v, heads, output.static), layer, q.dtype, addend).view(residual.shape)


def _by_torch(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(B, T, C), and (B, S, C) twice -> (B, T, C)."""
    B, T, C = q.shape
    q, k, v = (tensor.view(B, -1, heads, C // heads).transpose(1, 2) for tensor in (q, k, v))
    return dispatch.call(functional.scaled_dot_product_attention, q, k, v).transpose(1, 2).reshape(B, T, C)
