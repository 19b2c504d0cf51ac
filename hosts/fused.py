"""A layer in two steps: what writes its input's codes (norm, gate, or quantization alone), and its product. Knows no modules.

norm -> layer and GEGLU -> layer then cost one pass over the activation, and layers with equal tables share it. The result
is what norm -> quantize -> product gives one by one but for one rounding: the norm's or gate's output goes into the
quantizer in fp32, never rounded to 16 bit. With fp32 inputs the codes are the same (on the kernels, at most 1 apart on
fewer than 1 in 1000). Two steps, because only the product needs the weight: hosts fetch weights one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels.dispatch import DynamicScale, Kept, QuantizedActivation, Repeated, StaticScale
from .compute import LayerTensors, count_macs, int4_product


@dataclass(frozen=True)
class NormTensors:
    """weight, bias: (K,) any float dtype, on the input's device. eps: > 0."""

    weight: Tensor
    bias: Tensor
    eps: float

    @cached_property
    def operands(self) -> tuple[Kept]:
        """See kernels/repeat.py."""
        return (Kept(self.weight, self.bias, self.eps),)


def quantize(x: Tensor, static: StaticScale | None) -> QuantizedActivation:
    """(..., K) float, left unchanged -> codes (M, K): by the stored scales, or without them per token."""
    rows = x.reshape(-1, x.shape[-1])
    if static is None:
        return dispatch.quantize_token(rows)
    return dispatch.quantize_static(rows, static.scale, static.zero_point, static.bucket, static.clipped)


def quantize_images(x: Tensor, static: StaticScale | None) -> QuantizedActivation:
    """(B, C, H, W) float, any strides, left unchanged -> codes (B, H, W, C): by the stored scales, or without them per image."""
    if static is None:
        return dispatch.quantize_image(x)
    return dispatch.quantize_static(x, static.scale, static.zero_point, static.bucket, static.clipped)


def nearest_2x(images: QuantizedActivation) -> QuantizedActivation:
    """Codes (B, H, W, C) of images -> (B, 2 H, 2 W, C): what their nearest-neighbour enlargement would be quantized to."""
    B, H, W, C = images.codes.shape
    codes = images.codes[:, :, None, :, None].expand(B, H, 2, W, 2, C).reshape(B, 2 * H, 2 * W, C)
    return QuantizedActivation(codes, images.scale, images.zero_point, 4 * images.rows_per_scale)


def layer_norm(
    x: Tensor, norm: NormTensors, static: StaticScale | None, keep_float: bool = False
) -> tuple[QuantizedActivation, Tensor | None]:
    """LayerNorm of x (..., K) float, left unchanged -> codes (M, K); with keep_float also the normalised x in its shape and dtype."""
    rows = x.reshape(-1, x.shape[-1])
    activation, y = dispatch.layer_norm_quantize(rows, norm.weight, norm.bias, norm.eps, static, keep_float)
    return activation, None if y is None else y.view(x.shape)


def geglu(x: Tensor, static: StaticScale | None) -> QuantizedActivation:
    """GEGLU of x (..., 2K) float, values before gates, left unchanged -> codes (M, K)."""
    return dispatch.geglu_quantize(x.reshape(-1, x.shape[-1]), static)


def group_norm_silu(segments: Sequence[Tensor], norm: NormTensors, static: StaticScale | None) -> QuantizedActivation:
    """GroupNorm and SiLU before a convolution.

    Args: segments: 1 or 2 tensors (B, C_i, H, W) float, any strides, that a skip connection would concatenate; left unchanged.
    Returns: codes (B, H, W, C): by the stored scales, or without them per image.
    """
    entries = () if static is None else (static,)
    (activation,) = dispatch.group_norm_silu_quantize(segments, norm.weight, norm.bias, norm.eps, True, entries)
    return activation


def group_norm(x: Tensor, norm: NormTensors, static: StaticScale | None) -> QuantizedActivation:
    """GroupNorm of x (B, C, H, W) float, any strides, left unchanged -> codes (B * H * W, C) for a product over pixels."""
    entries = () if static is None else (static,)
    (activation,) = dispatch.group_norm_silu_quantize([x], norm.weight, norm.bias, norm.eps, False, entries, DynamicScale.TOKEN)
    return activation.as_rows()


def product(rows: QuantizedActivation, layer: LayerTensors, dtype: torch.dtype, addend: Tensor | None = None) -> Tensor:
    """A Linear or 1x1 convolution on codes (M, K) -> (M, N) dtype. addend: (M, N) contiguous, any float dtype, added in fp32."""
    if layer.group_scale is not None:
        y = int4_product(rows, layer, dtype, addend)
    else:
        qweight = layer.qweight.flatten(1)  # (N, K): a 1x1 conv's codes too
        y = dispatch.int8_gemm(rows, qweight, layer.weight_scale, layer.weight_sums, layer.bias, out_dtype=dtype, addend=addend)
    count_macs(layer, rows.codes.numel() * y.shape[1], y.device)
    return y


def products(rows: QuantizedActivation, layers: Sequence[LayerTensors], dtype: torch.dtype) -> list[Tensor]:
    """Linears of one shape on the same codes (M, K), in one launch -> per layer (M, N) dtype, whose rows may lie apart.

    With 4-bit weights each is a launch of its own.
    """
    if any(layer.group_scale is not None for layer in layers):
        return [product(rows, layer, dtype) for layer in layers]
    weights = [dispatch.LinearWeight(layer.qweight, layer.weight_scale, layer.weight_sums, layer.bias) for layer in layers]
    outputs = dispatch.int8_gemm_many(rows, weights, out_dtype=dtype)
    for layer in layers:
        count_macs(layer, rows.rows * layer.qweight.numel(), rows.codes.device)
    return outputs


def gated_product(rows: QuantizedActivation, layer: LayerTensors, dtype: torch.dtype, static: StaticScale | None) -> QuantizedActivation:
    """A Linear on codes (M, K) whose 2N outputs are values before gates, then GEGLU -> codes (M, N) for the next layer.

    Args: static: the next layer's stored scales; without them its input is made in dtype and quantized per token.
    """
    if layer.group_scale is not None:
        return geglu(product(rows, layer, dtype), static)
    count_macs(layer, rows.rows * layer.qweight.numel(), rows.codes.device)
    y = dispatch.int8_geglu_gemm(rows, layer.qweight, layer.weight_scale, layer.weight_sums, layer.bias, out_dtype=dtype, static=static)
    return dispatch.quantize_token(y) if static is None else y


def convolution(
    images: QuantizedActivation, layer: LayerTensors, dtype: torch.dtype, stride: int = 1, padding: int = 1, addend: Tensor | None = None
) -> Tensor:
    """A 3x3 convolution on codes (B, H, W, C) -> (B, Cout, Ho, Wo) dtype, channels_last.

    Args: addend: added in fp32, any float dtype: (B, Cout) contiguous, or (B, Cout, Ho, Wo) channels_last.
    """
    y = dispatch.int8_conv2d(
        images, layer.qweight, layer.weight_scale, layer.weight_sums, layer.bias, stride, padding, out_dtype=dtype, addend=addend
    )
    count_macs(layer, y.numel() * layer.qweight[0].numel(), y.device)
    return y


# The whole of a layer with what surrounds it, for layers whose weights are all at hand. Their launches are repeated.


@Repeated
def normed_products(x: Tensor, norm: NormTensors, static: StaticScale | None, layers: Sequence[LayerTensors]) -> list[Tensor]:
    """LayerNorm of x (..., K), and the Linears that read it -> per layer (..., N), whose rows may lie apart."""
    codes, _ = layer_norm(x, norm, static)
    outputs = [product(codes, layers[0], x.dtype)] if len(layers) == 1 else products(codes, layers, x.dtype)
    return [output.view(*x.shape[:-1], -1) for output in outputs]


@Repeated
def added_product(x: Tensor, static: StaticScale | None, layer: LayerTensors, residual: Tensor) -> Tensor:
    """A Linear of x (..., K), added to residual (..., N), any strides -> (..., N)."""
    addend = residual.reshape(-1, residual.shape[-1]).contiguous()
    return product(quantize(x, static), layer, x.dtype, addend).view(*x.shape[:-1], -1)


@Repeated
def feed_forward(
    x: Tensor,
    norm: NormTensors,
    statics: tuple[StaticScale | None, StaticScale | None],
    projection: LayerTensors,
    second: LayerTensors,
    residual: Tensor,
) -> Tensor:
    """LayerNorm of x (..., K), projection to values and gates, GEGLU, second Linear, added to residual (..., N) -> (..., N)."""
    codes, _ = layer_norm(x, norm, statics[0])
    codes = gated_product(codes, projection, x.dtype, statics[1])
    addend = residual.reshape(-1, residual.shape[-1]).contiguous()
    return product(codes, second, x.dtype, addend).view(*x.shape[:-1], -1)


@Repeated
def group_normed_product(x: Tensor, norm: NormTensors, static: StaticScale | None, layer: LayerTensors) -> Tensor:
    """GroupNorm of x (B, C, H, W), and the Linear that reads its pixels -> (B, H * W, N)."""
    return product(group_norm(x, norm, static), layer, x.dtype).view(x.shape[0], x.shape[2] * x.shape[3], -1)


@Repeated
def activated_convolution(
    x: Tensor, norm: NormTensors, static: StaticScale | None, layer: LayerTensors, addend: Tensor, stride: int, padding: int
) -> Tensor:
    """GroupNorm and SiLU of x (B, C, H, W), and the 3x3 convolution that reads it, plus addend -> (B, Cout, Ho, Wo).

    Args: addend: (B, Cout) or (B, Cout, Ho, Wo), any strides.
    """
    addend = addend.contiguous(memory_format=torch.channels_last if addend.ndim == 4 else torch.contiguous_format)
    return convolution(group_norm_silu([x], norm, static), layer, x.dtype, stride, padding, addend)
