"""A layer in two steps: what writes its input's codes (norm, gate, or quantization alone), and its product. Knows no modules.

norm -> layer and GEGLU -> layer then cost one pass over the activation, and layers with equal tables share it. The result
is what norm -> quantize -> product gives one by one but for one rounding: the norm's or gate's output goes into the
quantizer in fp32, never rounded to 16 bit. With fp32 inputs the codes are the same (on the kernels, at most 1 apart on
fewer than 1 in 1000). Two steps, because only the product needs the weight: hosts fetch weights one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels.activation import LARGEST_CODE
from ..kernels.dispatch import DynamicScale, Kept, QuantizedActivation, Repeated, StaticScale
from ..kernels.quantize_static import BUCKETS
from ..kernels.repeat import empty
from .compute import LayerTensors, code_convolution, code_product, count_macs, int4_product


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


# What is written of GEGLU's values before they are quantized per token: at 1024x1024 2048 of the 8192 tokens of the upper level (whole
# they are 40 MiB), and the lower level's at once.
MOST_GATED_BYTES = 20 * 2**20

# codes, of all of these: the dtype of the codes that the layer takes (LayerTensors.code_dtype); stored scales are of int8.


def quantize(x: Tensor, static: StaticScale | None, codes: torch.dtype = torch.int8) -> QuantizedActivation:
    """(..., K) float, left unchanged -> codes (M, K): by the stored scales, or without them per token."""
    rows = x.reshape(-1, x.shape[-1])
    if static is None:
        return dispatch.quantize_token(rows, codes)
    return dispatch.quantize_static(rows, static.scale, static.zero_point, static.bucket, static.clipped)


def quantize_images(x: Tensor, static: StaticScale | None, codes: torch.dtype = torch.int8) -> QuantizedActivation:
    """(B, C, H, W) float, any strides, left unchanged -> codes (B, H, W, C): by the stored scales, or without them per image."""
    if static is None:
        return dispatch.quantize_image(x, None, codes)
    return dispatch.quantize_static(x, static.scale, static.zero_point, static.bucket, static.clipped)


def nearest_2x(images: QuantizedActivation) -> QuantizedActivation:
    """Codes (B, H, W, C) of images -> (B, 2 H, 2 W, C): what their nearest-neighbour enlargement would be quantized to."""
    B, H, W, C = images.codes.shape
    # Sixteen codes at a time, as what is 16 bytes long: byte by byte the copy takes ten times as long.
    word = torch.complex128 if C % 16 == 0 else images.codes.dtype
    words = images.codes.contiguous().view(word)
    codes = words[:, :, None, :, None].expand(B, H, 2, W, 2, -1).reshape(B, 2 * H, 2 * W, -1).view(images.codes.dtype)
    return QuantizedActivation(codes, images.scale, images.zero_point, 4 * images.rows_per_scale)


def layer_norm(
    x: Tensor, norm: NormTensors, static: StaticScale | None, keep_float: bool = False, codes: torch.dtype = torch.int8
) -> tuple[QuantizedActivation, Tensor | None]:
    """LayerNorm of x (..., K) float, left unchanged -> codes (M, K); with keep_float also the normalised x in its shape and dtype."""
    rows = x.reshape(-1, x.shape[-1])
    activation, y = dispatch.layer_norm_quantize(rows, norm.weight, norm.bias, norm.eps, static, keep_float, codes)
    return activation, None if y is None else y.view(x.shape)


def geglu(x: Tensor, static: StaticScale | None, codes: torch.dtype = torch.int8) -> QuantizedActivation:
    """GEGLU of x (..., 2K) float, values before gates, left unchanged -> codes (M, K)."""
    return dispatch.geglu_quantize(x.reshape(-1, x.shape[-1]), static, codes)


def group_norm_silu(
    segments: Sequence[Tensor], norm: NormTensors, static: StaticScale | None, zero_point: bool, codes: torch.dtype = torch.int8
) -> QuantizedActivation:
    """GroupNorm and SiLU before a convolution.

    Args:
        segments: 1 or 2 tensors (B, C_i, H, W) float, any strides, that a skip connection would concatenate; left unchanged.
        zero_point: scales per image have one, as the convolution's layer has it (compute.LayerTensors.dynamic_low).
    Returns: codes (B, H, W, C): by the stored scales, or without them per image.
    """
    entries = () if static is None else (static,)
    dynamic = DynamicScale.SILU_IMAGE if zero_point else DynamicScale.IMAGE
    options = (norm.weight, norm.bias, norm.eps, True, entries, dynamic)
    (activation,) = dispatch.group_norm_silu_quantize(segments, *options, dtype=codes)
    return activation


def group_norm(x: Tensor, norm: NormTensors, static: StaticScale | None, codes: torch.dtype = torch.int8) -> QuantizedActivation:
    """GroupNorm of x (B, C, H, W) float, any strides, left unchanged -> codes (B * H * W, C) for a product over pixels."""
    entries = () if static is None else (static,)
    options = (norm.weight, norm.bias, norm.eps, False, entries, DynamicScale.TOKEN)
    (activation,) = dispatch.group_norm_silu_quantize([x], *options, dtype=codes)
    return activation.as_rows()


def product(rows: QuantizedActivation, layer: LayerTensors, dtype: torch.dtype, addend: Tensor | None = None) -> Tensor:
    """A Linear or 1x1 convolution on codes (M, K) -> (M, N) dtype. addend: (M, N) contiguous, any float dtype, added in fp32."""
    run = code_product if layer.group_scale is None else int4_product
    y = run(rows, layer, dtype, addend)
    count_macs(layer, rows.codes.numel() * y.shape[1], y.device)
    return y


def products(rows: QuantizedActivation, layers: Sequence[LayerTensors], dtype: torch.dtype) -> list[Tensor]:
    """Linears of one scheme and shape on the same codes (M, K), in one launch -> per layer (M, N) dtype, whose rows may lie apart."""
    if layers[0].group_scale is not None:
        outputs = dispatch.int4_gemm_many(rows, [_int4_weight(layer) for layer in layers], out_dtype=dtype)
    else:
        weights = [dispatch.LinearWeight(layer.qweight, layer.weight_scale, layer.weight_sums, layer.bias) for layer in layers]
        many = dispatch.fp8_gemm_many if layers[0].is_fp8 else dispatch.int8_gemm_many
        outputs = many(rows, weights, out_dtype=dtype)
    for layer, output in zip(layers, outputs, strict=True):
        count_macs(layer, rows.codes.numel() * output.shape[1], rows.codes.device)
    return outputs


def gated_product(
    rows: QuantizedActivation, layer: LayerTensors, dtype: torch.dtype, static: StaticScale | None, codes: torch.dtype = torch.int8
) -> QuantizedActivation:
    """A Linear on codes (M, K) whose 2N outputs are values before gates, then GEGLU -> codes (M, N) for the next layer.

    Args: static, codes: the next layer's stored scales; without them its input is made in dtype and quantized per token.
    """
    count_macs(layer, rows.codes.numel() * layer.qweight.shape[0], rows.codes.device)
    if layer.is_fp8:
        return _gated_fp8_product(rows, layer, dtype, static, codes)
    if static is None:
        return _gated_tokens(rows, layer, dtype, codes)
    return _gated(rows, layer, dtype, static, codes)


def _gated_tokens(rows: QuantizedActivation, layer: LayerTensors, dtype: torch.dtype, codes: torch.dtype) -> QuantizedActivation:
    """GEGLU's values quantized per token, a part of the rows at a time: whole, the values are a call's largest tensor."""
    M, N = rows.rows, layer.qweight.shape[0] // 2
    at_once = max(MOST_GATED_BYTES // (N * dtype.itemsize), 1)
    if at_once >= M or rows.rows_per_scale != 1:
        return dispatch.quantize_token(_gated(rows, layer, dtype, None), codes)
    if layer.group_scale is not None:
        (layer,) = written_out([layer], at_once, rows.codes.shape[1]) or (layer,)
    whole = QuantizedActivation(empty((M, N), codes, rows.codes.device), empty((M,), torch.float32, rows.codes.device), None, 1)
    for first in range(0, M, at_once):
        last = min(first + at_once, M)
        dispatch.quantize_token(_gated(rows.part(first, last), layer, dtype, None), codes, whole.part(first, last))
    return whole


def _gated(
    rows: QuantizedActivation, layer: LayerTensors, dtype: torch.dtype, static: StaticScale | None, codes: torch.dtype = torch.int8
) -> Tensor | QuantizedActivation:
    if layer.group_scale is not None:
        return dispatch.int4_geglu_gemm(rows, *_int4_weight(layer), out_dtype=dtype, static=static)
    weight = (layer.qweight, layer.weight_scale, layer.weight_sums, layer.bias)
    return dispatch.int8_geglu_gemm(rows, *weight, out_dtype=dtype, static=static, codes=codes)


def _gated_fp8_product(
    rows: QuantizedActivation, layer: LayerTensors, dtype: torch.dtype, static: StaticScale | None, codes: torch.dtype
) -> QuantizedActivation:
    if codes is dispatch.FP8:
        return dispatch.fp8_geglu_gemm(rows, layer.qweight, layer.weight_scale, layer.bias, dtype, static=static)
    return geglu(code_product(rows, layer, dtype), static, codes)


def bounded_geglu_scale(norm: NormTensors, projection: LayerTensors) -> StaticScale:
    """A scale of fp8 codes that no value of GEGLU passes, whatever the LayerNorm's input: the same for every row and timestep.

    A normalised row z has |z| <= sqrt(K), and x = z * norm.weight + norm.bias. By Cauchy-Schwarz, for a row w of the weight,
    |w . x| <= sqrt(K) |w * norm.weight| + |w| |norm.bias|, and |x| <= r = sqrt(K) max |norm.weight| + |norm.bias|. x is rounded: fp8
    codes are within 1/16 of each value, which adds as much of the first bound; int8 codes within |x| / 254, which adds |w| r sqrt(K) / 254.
    With |bias| that bounds values and gates; as |gelu(g)| <= |g|, their product bounds GEGLU's values. Usually 2^4 to 2^8 too large,
    which e4m3's range bears. Made of the weights alone: once per load.
    """
    factor, offset = norm.weight.float(), norm.bias.float().norm()
    root = projection.qweight.shape[1] ** 0.5
    bounds = []
    for codes, scale in zip(projection.qweight.split(2048), projection.weight_scale.split(2048), strict=True):  # 10 MiB at a time
        weight = codes.float() * scale[:, None]
        length = weight.norm(dim=1)
        bound = root * (weight * factor).norm(dim=1) + length * offset
        rounding = bound / 16 if projection.is_fp8 else length * (root * factor.abs().amax() + offset) * root / 254
        bounds.append(bound + rounding)
    bound = torch.cat(bounds)
    if projection.bias is not None:
        bound += projection.bias.float().abs()
    values, gates = bound.chunk(2)
    scale = (values * gates).amax() / LARGEST_CODE[dispatch.FP8]
    return StaticScale(scale.expand(BUCKETS).contiguous(), None, torch.zeros(1, dtype=torch.int64, device=scale.device))


def written_out(layers: Sequence[LayerTensors], rows: int, K: int) -> list[LayerTensors] | None:
    """Layers of one shape with 4-bit weights, as layers with int8 codes: in one launch, where each product would write out its own.

    Args: rows, K: of what the layers are going to read. Returns: None where products unpack the weights on their way.
    """
    if not dispatch.expands_int4(rows, layers[0].qweight.device):
        return None
    codes = dispatch.int4_expand([layer.qweight for layer in layers], [layer.group_scale for layer in layers], K)
    return [replace(layer, qweight=own, group_scale=None) for layer, own in zip(layers, codes, strict=True)]


def _int4_weight(layer: LayerTensors) -> dispatch.Int4LinearWeight:
    return dispatch.Int4LinearWeight(layer.qweight, layer.group_scale, layer.weight_scale, layer.weight_sums, layer.bias)


def convolution(
    images: QuantizedActivation, layer: LayerTensors, dtype: torch.dtype, stride: int = 1, padding: int = 1, addend: Tensor | None = None
) -> Tensor:
    """A 3x3 convolution on codes (B, H, W, C) -> (B, Cout, Ho, Wo) dtype, channels_last.

    Args: addend: added in fp32, any float dtype: (B, Cout) contiguous, or (B, Cout, Ho, Wo) channels_last.
    """
    y = code_convolution(images, layer, dtype, stride, padding, addend)
    count_macs(layer, y.numel() * layer.qweight[0].numel(), y.device)
    return y


# The whole of a layer with what surrounds it, for layers whose weights are all at hand. Their launches are repeated.


@Repeated
def normed_products(x: Tensor, norm: NormTensors, static: StaticScale | None, layers: Sequence[LayerTensors]) -> list[Tensor]:
    """LayerNorm of x (..., K), and the Linears that read it -> per layer (..., N), whose rows may lie apart."""
    codes, _ = layer_norm(x, norm, static, codes=layers[0].code_dtype)
    outputs = [product(codes, layers[0], x.dtype)] if len(layers) == 1 else products(codes, layers, x.dtype)
    return [output.view(*x.shape[:-1], -1) for output in outputs]


@Repeated
def added_product(x: Tensor, static: StaticScale | None, layer: LayerTensors, residual: Tensor | None) -> Tensor:
    """A Linear of x (..., K), added to residual (..., N), any strides, if that is given -> (..., N)."""
    addend = None if residual is None else residual.reshape(-1, residual.shape[-1]).contiguous()
    return product(quantize(x, static, layer.code_dtype), layer, x.dtype, addend).view(*x.shape[:-1], -1)


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
    codes, _ = layer_norm(x, norm, statics[0], codes=projection.code_dtype)
    codes = gated_product(codes, projection, x.dtype, statics[1], second.code_dtype)
    addend = residual.reshape(-1, residual.shape[-1]).contiguous()
    return product(codes, second, x.dtype, addend).view(*x.shape[:-1], -1)


@Repeated
def gated_values(x: Tensor, norm: NormTensors, static: StaticScale | None, projection: LayerTensors) -> Tensor:
    """LayerNorm of x (..., K), projection to values and gates, GEGLU -> (..., N), for a second Linear that takes no codes."""
    codes, _ = layer_norm(x, norm, static)
    count_macs(projection, codes.codes.numel() * projection.qweight.shape[0], x.device)
    return _gated(codes, projection, x.dtype, None).view(*x.shape[:-1], -1)


@Repeated
def group_normed_product(x: Tensor, norm: NormTensors, static: StaticScale | None, layer: LayerTensors) -> Tensor:
    """GroupNorm of x (B, C, H, W), and the Linear that reads its pixels -> (B, H * W, N)."""
    return product(group_norm(x, norm, static, layer.code_dtype), layer, x.dtype).view(x.shape[0], x.shape[2] * x.shape[3], -1)


@Repeated
def activated_convolution(
    x: Tensor,
    norm: NormTensors,
    static: StaticScale | None,
    layer: LayerTensors,
    zero_point: bool,
    addend: Tensor,
    stride: int,
    padding: int,
    skip: Tensor | None = None,
) -> Tensor:
    """GroupNorm and SiLU of x (B, C, H, W), and the 3x3 convolution that reads it, plus addend -> (B, Cout, Ho, Wo).

    Args:
        zero_point: as group_norm_silu's. addend: (B, Cout) or (B, Cout, Ho, Wo), any strides.
        skip: (B, C_2, H, W), what x would be joined with along the channels.
    """
    addend = addend.contiguous(memory_format=torch.channels_last if addend.ndim == 4 else torch.contiguous_format)
    codes = group_norm_silu([x] if skip is None else [x, skip], norm, static, zero_point, layer.code_dtype)
    return convolution(codes, layer, x.dtype, stride, padding, addend)


@Repeated
def joined_product(x: Tensor, skip: Tensor, static: StaticScale | None, layer: LayerTensors) -> Tensor:
    """A 1x1 convolution of x (B, C_1, H, W) and skip (B, C_2, H, W), joined along the channels -> (B, Cout, H, W) channels_last."""
    B, _, H, W = x.shape
    return product(dispatch.quantize_joined(x, skip, static, layer.code_dtype), layer, x.dtype).view(B, H, W, -1).permute(0, 3, 1, 2)
