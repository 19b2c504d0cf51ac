"""Quantized layers with what surrounds them: the norm or gate before, the addition after. Falls back to the modules one by one.

A layer that has a weight function, a scheme without integer compute or no codes runs its own forward, and so does its norm;
a low-rank branch runs beside the product where its float input is at hand. Weights are borrowed one at a time: ComfyUI's
buffers for offloaded weights are reused as soon as two more have been fetched.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....kernels.dispatch import StaticScale
from ....kernels.group_norm_silu_quantize import GROUPS
from ....kernels.layer_norm_quantize import MAX_ROW
from ....quant.scheme import ActivationMode, ComputeType
from ... import fused
from ...compute import LayerTensors
from ...fused import NormTensors
from ...fused_transformer import Added, Gated, Normed
from ..graph_capture import is_capturing
from ..norms import borrow_norm, resident_norm
from ..ops import QuantizableOp

FUSABLE = (ActivationMode.TOKEN, ActivationMode.STATIC)
# What GroupNorm and SiLU write for a convolution; other producers have no 16-bit codes, and such layers run one by one.
FUSABLE_CONV = (*FUSABLE, ActivationMode.TOKEN16)


def can_fuse(layer: nn.Module, modes: Sequence[ActivationMode] = FUSABLE) -> bool:
    """Whether the layer takes codes that a producer can write, in one of the modes. Does not change after a model is attached."""
    if not isinstance(layer, QuantizableOp) or not layer.is_quantized:
        return False
    inputs = layer.weight.shape[1]
    return layer.scheme.activation in modes and layer.scheme.compute is not ComputeType.FP16 and inputs <= MAX_ROW


def stored_scale(layer: QuantizableOp, bucket: Tensor, units: int) -> StaticScale | None:
    """The layer's tables on the bucket's device; None if it is dynamic or the samples do not divide the units (images or rows)."""
    if layer.scheme.activation is not ActivationMode.STATIC or layer.act_scale is None or units % bucket.numel():
        return None
    saturation = layer.saturation
    if saturation is not None and saturation.switched:
        return None
    # While weights are held, so are copies of the tables that stay where they are: a CUDA graph reads those.
    tables = layer.resident.tensors if layer.is_held else layer
    zero_point = tables.act_zero_point
    zero_point = None if zero_point is None else zero_point.to(bucket.device)
    return StaticScale(tables.act_scale.to(bucket.device), zero_point, bucket, None if saturation is None else saturation.counters)


def _watch_together(layers: Sequence[QuantizableOp]) -> None:
    """Clipped values of layers that share one quantization are counted once, and they switch together."""
    first = layers[0].saturation
    for layer in layers[1:] if first is not None else ():
        first.layers.append(layer.layer_name)
        layer.saturation = first


def held_tensors(x: Tensor, norm: nn.Module | None, layers: Sequence[QuantizableOp]) -> list | None:
    """[NormTensors, LayerTensors...] of what can run in one piece: all weights are held, and no branch needs a float input.

    Without a norm: of the layers alone. None if the layers must be borrowed one by one.
    """
    found = []
    if norm is not None:
        if (tensors := resident_norm(norm, x)) is None:
            return None
        found.append(tensors)
    for layer in layers:
        if layer.has_branch or not layer.is_held or not layer.kernels_fit():
            return None
        found.append(layer.resident.tensors)
    return found


class WrittenOut:
    """4-bit Linears of one shape in a block as layers with int8 codes, for one call: one launch instead of one for each product."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        is_alike = len({tuple(layer.weight.shape) for layer in layers}) == 1
        self.possible = is_alike and all(can_fuse(layer) and layer.scheme.is_int4 for layer in layers)

    def __call__(self, x: Tensor) -> list[LayerTensors | None]:
        """x (..., K): has the rows that the layers are going to read. None for each layer if they are to run as they are."""
        found = None
        if self.possible and (held := held_tensors(x, None, self._layers)):
            found = fused.written_out(held, x.numel() // x.shape[-1], self._layers[0].weight.shape[1])
        return found or [None] * len(self._layers)


class NormedLinears:
    """A LayerNorm and the Linears that read its result, which is quantized once."""

    def __init__(self, norm: nn.LayerNorm, layers: Sequence[nn.Module]) -> None:
        self._norm, self._layers = norm, layers
        self._fusable = all(can_fuse(layer) for layer in layers) and all(layer.scheme == layers[0].scheme for layer in layers)
        self._tables: list[Tensor | None] | None = None
        self._shared = False
        if self._fusable and self._share_tables():
            _watch_together(layers)

    def __call__(self, x: Tensor, bucket: Tensor, written_out: Sequence[LayerTensors | None] = ()) -> list[Tensor]:
        """x (..., K) -> per layer (..., N). written_out: the layers' tensors to use instead of their own, if not None."""
        if (held := self.held(x, bucket)) is not None:
            return fused.normed_products(x, held.norm, held.static, list(written_out if any(written_out) else held.layers))
        outputs = self._fused(x, bucket) if self._can_fuse() else None
        if outputs is None:
            y = self._norm(x)
            outputs = [layer(y) for layer in self._layers]
        return outputs

    def held(self, x: Tensor, bucket: Tensor) -> Normed | None:
        """What runs in one piece for x (..., K); None if the layers must be borrowed one by one, or not be fused."""
        held = held_tensors(x, self._norm, self._layers) if self._can_fuse() else None
        return held and Normed(held[0], stored_scale(self._layers[0], bucket, x.numel() // x.shape[-1]), tuple(held[1:]))

    def _can_fuse(self) -> bool:
        return self._fusable and not any(layer.weight_function for layer in self._layers) and self._share_tables()

    def _share_tables(self) -> bool:
        """Whether one quantization serves all. Compares values, which waits for the GPU: once, and when tables are replaced."""
        if len(self._layers) == 1 or self._layers[0].scheme.activation is not ActivationMode.STATIC:
            return True
        tables = [table for layer in self._layers for table in (layer.act_scale, layer.act_zero_point)]
        if self._tables is None or any(new is not old for new, old in zip(tables, self._tables, strict=True)):
            if self._tables is not None and is_capturing(tables[0].device):
                return self._shared  # a model that was moved; nothing may wait here
            self._tables = tables
            self._shared = all(_equal(table, first) for table, first in zip(tables, tables[:2] * len(self._layers), strict=True))
        return self._shared

    def _fused(self, x: Tensor, bucket: Tensor) -> list[Tensor] | None:
        has_branch = any(layer.has_branch for layer in self._layers)
        with borrow_norm(self._norm, x) as norm:
            if norm is None:
                return None
            static = stored_scale(self._layers[0], bucket, x.numel() // x.shape[-1])
            codes, y = fused.layer_norm(x, norm, static, has_branch, self._layers[0].code_dtype)
        outputs = []
        for layer in self._layers:
            with layer.borrow(x) as tensors:
                if tensors is None:
                    return None
                output = fused.product(codes, tensors, x.dtype).view(*x.shape[:-1], -1)
                outputs.append(_with_branches(output, y, tensors, layer))
        return outputs


class AddedLinear:
    """A Linear whose result is added to a residual, if there is one: attention's output, the feed-forward's second layer, proj_out."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer, self._fusable = layer, can_fuse(layer)

    def __call__(self, x: Tensor, residual: Tensor | None, bucket: Tensor, written_out: LayerTensors | None = None) -> Tensor:
        """x (..., K), residual (..., N) -> (..., N). written_out: the layer's tensors to use instead of its own."""
        if (held := self.held(x, bucket)) is not None:
            return fused.added_product(x, held.static, written_out or held.layer, residual)
        layer, output = self._layer, None
        if self._fusable and not layer.weight_function:
            codes = fused.quantize(x, stored_scale(layer, bucket, x.numel() // x.shape[-1]), layer.code_dtype)
            output = self.of_codes(codes, x, residual, branches=layer.has_branch)
        if output is None:
            output = layer(x) if residual is None else layer(x) + residual
        return output

    def held(self, x: Tensor, bucket: Tensor) -> Added | None:
        """What runs in one piece for x, which has the dtype and rows of the layer's input; None as NormedLinears.held."""
        held = held_tensors(x, None, [self._layer]) if self._fusable and not self._layer.weight_function else None
        return held and Added(stored_scale(self._layer, bucket, x.numel() // x.shape[-1]), held[0])

    def after_geglu(self, x: Tensor, residual: Tensor | None, bucket: Tensor) -> Tensor:
        """x (..., 2K), values before gates; residual (..., N) or None -> (..., N)."""
        layer, output = self._layer, None
        if self._fusable and not layer.has_branch and not layer.weight_function:
            codes = fused.geglu(x, stored_scale(layer, bucket, x.numel() // x.shape[-1]), layer.code_dtype)
            output = self.of_codes(codes, x, residual)
        if output is None:
            value, gate = x.chunk(2, dim=-1)
            output = layer(value * functional.gelu(gate))
            output = output if residual is None else output + residual
        return output

    def of_codes(self, codes: fused.QuantizedActivation, x: Tensor, residual: Tensor | None, branches: bool = False) -> Tensor | None:
        """codes (M, K); x: has the shape before the layer's width, and the dtype. None if the layer must run its own forward.

        branches: x is the layer's float input, for its branches.
        """
        addend = None if residual is None else residual.reshape(-1, residual.shape[-1]).contiguous()
        with self._layer.borrow(x) as tensors:
            if tensors is None:
                return None
            output = fused.product(codes, tensors, x.dtype, addend).view(*x.shape[:-1], -1)
            return _with_branches(output, x, tensors, self._layer) if branches else output


class GatedLinears:
    """A feed-forward block: LayerNorm, projection to values and gates, GEGLU in the projection's epilogue, second Linear, addition."""

    def __init__(self, norm: nn.LayerNorm, projection: nn.Module, second: nn.Module) -> None:
        self._norm, self._projection, self._second_layer = norm, projection, second
        self._gates, self._second = NormedLinears(norm, [projection]), AddedLinear(second)
        self._fusable = can_fuse(projection) and can_fuse(second)
        self._makes_floats = can_fuse(projection) and not can_fuse(second) and not projection.scheme.is_fp8
        self._is_fp8 = self._fusable and second.scheme.is_fp8 and not projection.scheme.is_int4
        self._bounded: Callable[[], Tensor | None] = lambda: None  # the projection's weight that _bounding is of
        self._bounding: StaticScale | None = None

    def __call__(self, x: Tensor, residual: Tensor, bucket: Tensor) -> Tensor:
        """x (..., K), residual (..., N) -> (..., N)."""
        if (held := self.held(x, bucket)) is not None:
            return fused.feed_forward(x, held.norm, held.statics, held.projection, held.second, residual)
        if (values := self._values(x, bucket)) is not None:
            return self._second_layer(values) + residual
        y = self._fused(x, residual, bucket) if self._can_fuse() else None
        if y is None:
            (gates,) = self._gates(x, bucket)
            y = self._second.after_geglu(gates, residual, bucket)
        return y

    def held(self, x: Tensor, bucket: Tensor) -> Gated | None:
        """What runs in one piece for x (..., K); None as NormedLinears.held."""
        held = held_tensors(x, self._norm, (self._projection, self._second_layer)) if self._can_fuse() else None
        if held is None:
            return None
        (norm, projection, second), rows = held, x.numel() // x.shape[-1]
        static = self._bound(norm, projection) or stored_scale(self._second_layer, bucket, rows)
        return Gated(norm, (stored_scale(self._projection, bucket, rows), static), projection, second)

    def _values(self, x: Tensor, bucket: Tensor) -> Tensor | None:
        """GEGLU of x (..., K) in floats, never written with its gates, for a second layer that stays 16 bit; None if not held."""
        layer = self._projection
        if not self._makes_floats or layer.weight_function or not (held := held_tensors(x, self._norm, [layer])):
            return None
        return fused.gated_values(x, held[0], stored_scale(layer, bucket, x.numel() // x.shape[-1]), held[1])

    def _can_fuse(self) -> bool:
        layers = self._projection, self._second_layer
        return self._fusable and not any(layer.has_branch or layer.weight_function for layer in layers)

    def _fused(self, x: Tensor, residual: Tensor, bucket: Tensor) -> Tensor | None:
        rows = x.numel() // x.shape[-1]
        with borrow_norm(self._norm, x) as norm:
            if norm is None:
                return None
            codes, _ = fused.layer_norm(x, norm, stored_scale(self._projection, bucket, rows), codes=self._projection.code_dtype)
            norm = NormTensors(norm.weight.clone(), norm.bias.clone(), norm.eps) if self._is_fp8 else norm
        with self._projection.borrow(x) as tensors:
            if tensors is None:
                return None
            static = self._bound(norm, tensors) or stored_scale(self._second_layer, bucket, rows)
            codes = fused.gated_product(codes, tensors, x.dtype, static, self._second_layer.code_dtype)
        return self._second.of_codes(codes, x, residual)

    def _bound(self, norm: NormTensors, projection: LayerTensors) -> StaticScale | None:
        """The scale of fp8 codes between the two layers, made once per weight; None for other codes, whose scales follow the values."""
        if not self._is_fp8 or self._projection.scales is not None or self._norm.scales is not None:
            return None
        weight, device = self._projection.weight, projection.qweight.device
        if self._bounded() is not weight or self._bounding.scale.device != device:
            if is_capturing(device):
                return None
            self._bounding, self._bounded = fused.bounded_geglu_scale(norm, projection), weakref.ref(weight)
        return self._bounding


class GroupNormedLinear:
    """A GroupNorm without SiLU and the Linear that reads its pixels: the entrance of a SpatialTransformer."""

    def __init__(self, norm: nn.GroupNorm, layer: nn.Module) -> None:
        self._norm, self._layer = norm, layer
        self._fusable = can_fuse(layer) and norm.num_groups == GROUPS

    def __call__(self, x: Tensor, bucket: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, H * W, N)."""
        layer, tokens = self._layer, None
        if self._fusable and not layer.has_branch and not layer.weight_function:
            tokens = self._fused(x, bucket)
        return layer(self._norm(x).permute(0, 2, 3, 1).flatten(1, 2)) if tokens is None else tokens

    def _fused(self, x: Tensor, bucket: Tensor) -> Tensor | None:
        if held := held_tensors(x, self._norm, [self._layer]):
            return fused.group_normed_product(x, held[0], stored_scale(self._layer, bucket, x.shape[0]), held[1])
        with borrow_norm(self._norm, x) as norm:
            if norm is None:
                return None
            codes = fused.group_norm(x, norm, stored_scale(self._layer, bucket, x.shape[0]), self._layer.code_dtype)
        with self._layer.borrow(x) as tensors:
            return None if tensors is None else fused.product(codes, tensors, x.dtype).view(x.shape[0], x.shape[2] * x.shape[3], -1)


class ActivatedConv:
    """GroupNorm, SiLU, 3x3 convolution and an addition: either half of a ResBlock."""

    def __init__(self, norm: nn.GroupNorm, conv: nn.Module) -> None:
        self._norm, self._conv = norm, conv
        self._fusable = can_fuse(conv, FUSABLE_CONV) and norm.num_groups == GROUPS
        self._zero_point = self._fusable and not conv.scheme.symmetric

    def __call__(self, x: Tensor, addend: Tensor, bucket: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), addend (B, Cout) or (B, Cout, Ho, Wo) -> (B, Cout, Ho, Wo). skip: what x is joined with."""
        conv, y = self._conv, None
        if self._fusable and conv.branch is None and not conv.weight_function:
            y = self._fused(x, addend, bucket, skip)
        if y is None:
            x = x if skip is None else torch.cat((x, skip), 1)
            y = conv(functional.silu(self._norm(x))) + addend.to(x.dtype).view(*addend.shape, *(1,) * (4 - addend.ndim))
        return y

    def _fused(self, x: Tensor, addend: Tensor, bucket: Tensor, skip: Tensor | None) -> Tensor | None:
        conv = self._conv
        if held := held_tensors(x, self._norm, [conv]):
            static = stored_scale(conv, bucket, x.shape[0])
            return fused.activated_convolution(x, held[0], static, held[1], self._zero_point, addend, conv.stride[0], conv.padding[0], skip)
        with borrow_norm(self._norm, x) as norm:
            if norm is None:
                return None
            segments = [x] if skip is None else [x, skip]
            codes = fused.group_norm_silu(segments, norm, stored_scale(conv, bucket, x.shape[0]), self._zero_point, conv.code_dtype)
        addend = addend.contiguous(memory_format=torch.channels_last if addend.ndim == 4 else torch.contiguous_format)
        with conv.borrow(x) as tensors:
            return None if tensors is None else fused.convolution(codes, tensors, x.dtype, conv.stride[0], conv.padding[0], addend)


class JoinedConv:
    """The 1x1 convolution of a ResBlock's joined input, which is never made: its pixels are quantized from both images."""

    def __init__(self, conv: nn.Module) -> None:
        self._conv = conv
        self._fusable = can_fuse(conv) and conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0)

    def __call__(self, x: Tensor, skip: Tensor, bucket: Tensor) -> Tensor:
        """x (B, C_1, H, W), skip (B, C_2, H, W) -> (B, Cout, H, W)."""
        conv, y = self._conv, None
        if self._fusable and conv.branch is None and not conv.weight_function:
            static = stored_scale(conv, bucket, x.shape[0])
            if held := held_tensors(x, None, [conv]):
                return fused.joined_product(x, skip, static, held[0])
            with conv.borrow(x) as tensors:
                y = None if tensors is None else fused.joined_product(x, skip, static, tensors)
        return conv(torch.cat((x, skip), 1)) if y is None else y


class UpsampledConv:
    """A 3x3 convolution of the image at twice its size: the small image is quantized, and its codes are repeated.

    Exact: the nearest neighbours of a value have its code, and repeating them changes no image's absmax.
    """

    def __init__(self, conv: nn.Module) -> None:
        self._conv, self._fusable = conv, can_fuse(conv)

    def __call__(self, x: Tensor, bucket: Tensor) -> Tensor | None:
        """x (B, C, H, W) -> (B, Cout, 2 H, 2 W), or None if the layer must run its own forward."""
        conv = self._conv
        if not self._fusable or conv.branch is not None or conv.weight_function:
            return None
        with conv.borrow(x) as tensors:
            if tensors is None:
                return None
            codes = fused.nearest_2x(fused.quantize_images(x, stored_scale(conv, bucket, x.shape[0]), conv.code_dtype))
            return fused.convolution(codes, tensors, x.dtype, conv.stride[0], conv.padding[0])


def _with_branches(y: Tensor, x: Tensor, tensors: LayerTensors, layer: QuantizableOp) -> Tensor:
    """y (..., N) of the layer's codes, and what its own branch and a LoRA's add to it for its float input x (..., K)."""
    for branch in (tensors.branch, layer.branch):
        y = y if branch is None else y + branch.linear(x)
    return y


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
