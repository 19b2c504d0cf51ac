"""Norm or gate, quantization and product in one go, for blocks whose layers follow each other directly. Knows no modules and no patches.

The result is what norm -> quantize -> product gives one by one, but for one rounding: the norm's or gate's output goes
into the quantizer in fp32, never rounded to 16 bit. With fp32 inputs the codes are the same (on the kernels, at most 1
apart on fewer than 1 in 1000). Layers that keep a float input run one by one, with the ordinary functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels import dispatch
from ..kernels.dispatch import DynamicScale, QuantizedActivation, StaticScale
from ..kernels.group_norm_silu_quantize import GROUPS
from . import compute
from .compute import LayerTensors


@dataclass(frozen=True)
class NormTensors:
    """weight, bias: (K,) any float dtype, on the input's device. eps: > 0."""

    weight: Tensor
    bias: Tensor
    eps: float


def can_share_input(layers: Sequence[LayerTensors]) -> bool:
    """Whether one quantization serves all these layers: equal schemes and equal activation tables.

    Compares values, so it waits for the GPU: ask once when the block is bound, not per call.
    """
    first = layers[0]
    return all(layer.scheme == first.scheme for layer in layers) and all(
        _equal(layer.act_scale, first.act_scale) and _equal(layer.act_zero_point, first.act_zero_point) for layer in layers
    )


def layer_norm_linear(
    x: Tensor, norm: NormTensors, layers: Sequence[LayerTensors], bucket: Tensor, keep_float: bool = False
) -> tuple[list[Tensor], Tensor | None]:
    """LayerNorm, then every layer on its result, which is quantized once: q, k and v, or a single projection.

    Args:
        x: (..., K) float; left unchanged.
        layers: Linears for which can_share_input holds.
        bucket: as for compute.linear.
        keep_float: also return the normalised x, for a branch of a layer that needs floats.
    Returns: per layer (..., N) in x's dtype; and the normalised x (..., K) in x's dtype, or None.
    """
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    if layers[0].keeps_float_input:
        y = functional.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
        return [compute.linear(y, layer, bucket) for layer in layers], y if keep_float else None
    static = _static(layers[0], bucket, rows.shape[0])
    activation, y = dispatch.layer_norm_quantize(rows, norm.weight, norm.bias, norm.eps, static, keep_float)
    outputs = [_product(activation, layer, x.dtype).view(*x.shape[:-1], -1) for layer in layers]
    return outputs, None if y is None else y.view(x.shape)


def geglu_linear(x: Tensor, layer: LayerTensors, bucket: Tensor) -> Tensor:
    """GEGLU, then the layer: the second half of a feed-forward block.

    Args:
        x: (..., 2K) float, values before gates; left unchanged. bucket: as for compute.linear.
    Returns: (..., N) in x's dtype.
    """
    if layer.keeps_float_input:
        value, gate = x.chunk(2, dim=-1)
        return compute.linear(value * functional.gelu(gate), layer, bucket)
    rows = x.reshape(-1, x.shape[-1])  # (M, 2K)
    activation = dispatch.geglu_quantize(rows, _static(layer, bucket, rows.shape[0]))
    return _product(activation, layer, x.dtype).view(*x.shape[:-1], -1)


def group_norm_silu_conv(
    segments: Sequence[Tensor], norm: NormTensors, layer: LayerTensors, bucket: Tensor, stride: int = 1, padding: int = 1
) -> Tensor:
    """GroupNorm, SiLU, then the convolution, of one tensor or of two that a skip connection would concatenate.

    Args:
        segments: 1 or 2 tensors (B, C_i, H, W) float, any strides; left unchanged.
        layer: a 3x3 convolution over all their channels. bucket, stride, padding: as for compute.conv2d.
    Returns: (B, Cout, Ho, Wo) in the first segment's dtype.
    """
    if layer.keeps_float_input:
        return compute.conv2d(functional.silu(_group_norm(segments, norm)), layer, bucket, stride, padding)
    static = _static(layer, bucket, segments[0].shape[0])
    entries = () if static is None else (static,)
    (activation,) = dispatch.group_norm_silu_quantize(segments, norm.weight, norm.bias, norm.eps, True, entries)
    sums, bias, dtype = layer.weight_sums, layer.bias, segments[0].dtype
    y = dispatch.int8_conv2d(activation, layer.qweight, layer.weight_scale, sums, bias, stride, padding, out_dtype=dtype)
    _count(layer, y.numel() * layer.qweight[0].numel(), y.device)
    return y


def group_norm_linear(x: Tensor, norm: NormTensors, layer: LayerTensors, bucket: Tensor) -> Tensor:
    """GroupNorm, then the layer on every pixel: the entrance of a SpatialTransformer. No SiLU.

    Args:
        x: (B, C, H, W) float, any strides; left unchanged. layer: Linear, or 1x1 convolution. bucket: as for compute.linear.
    Returns: (B, H * W, N) in x's dtype.
    """
    B, _, H, W = x.shape
    if layer.keeps_float_input:
        pixels = _group_norm([x], norm).permute(0, 2, 3, 1).reshape(B, H * W, -1)
        return compute.linear(pixels, layer, bucket)
    static = _static(layer, bucket, B)
    entries = () if static is None else (static,)
    (activation,) = dispatch.group_norm_silu_quantize([x], norm.weight, norm.bias, norm.eps, False, entries, DynamicScale.TOKEN)
    return _product(activation.as_rows(), layer, x.dtype).view(B, H * W, -1)


def _group_norm(segments: Sequence[Tensor], norm: NormTensors) -> Tensor:
    x = torch.cat(list(segments), 1) if len(segments) > 1 else segments[0]
    return functional.group_norm(x, GROUPS, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def _static(layer: LayerTensors, bucket: Tensor, units: int) -> StaticScale | None:
    """The layer's stored scales; None if it has none or its samples cannot be told from the units (images or rows)."""
    if not layer.is_static or units % bucket.numel():
        return None
    return StaticScale(layer.act_scale, layer.act_zero_point, bucket)


def _product(rows: QuantizedActivation, layer: LayerTensors, dtype: torch.dtype) -> Tensor:
    """(M, K) codes -> (M, N)."""
    qweight = layer.qweight.flatten(1)  # (N, K): a 1x1 conv's codes too
    y = dispatch.int8_gemm(rows, qweight, layer.weight_scale, layer.weight_sums, layer.bias, out_dtype=dtype)
    _count(layer, rows.rows * qweight.numel(), y.device)
    return y


def _count(layer: LayerTensors, macs: int, device: torch.device) -> None:
    if layer.counter is not None:
        layer.counter.record(layer.name, macs, dispatch.choose_backend(device).backend.is_integer)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
