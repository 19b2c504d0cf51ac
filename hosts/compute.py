"""Forward of one quantized layer, the same in every engine. Knows tensors and kernels, not modules, patches or devices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SchemeError
from ..kernels import dispatch
from ..kernels.dispatch import ChannelGroups, Kept, QuantizedActivation, StaticScale, WideActivation
from ..quant.layers import dynamic_low
from ..quant.mac_counter import MacCounter
from ..quant.saturation import LayerSaturation
from ..quant.scheme import ActivationMode, ComputeType, Scheme
from ..quant.weight import dequantize_weight
from .low_rank import LowRankBranch


@dataclass
class LayerTensors:
    """What one layer's forward needs, all on the input's device.

    qweight: int8 or fp8 (N, K), or (Cout, kh, kw, Cin); packed of 4-bit weights, which have a group_scale as the kernels take it
        (kernels/int4_weight.py). weight_scale: fp32 (N,). bias: (N,) any float dtype, or None.
    weight_sums: from sums_of_codes, or None if the activation is symmetric.
    act_scale: fp32 (64,), act_zero_point: int32 (64,), of static layers; None otherwise.
    counter: if set, told of every call. groups: of layers with channel groups, whose qweight is in their order; else None.
    saturation: of static layers whose clipped values are watched.
    branch: the layer's own, of its file; a LoRA's is the host's business. `linear` adds it; who calls the products adds it himself.
    """

    name: str
    scheme: Scheme
    qweight: Tensor
    weight_scale: Tensor
    bias: Tensor | None = None
    weight_sums: Tensor | None = None
    act_scale: Tensor | None = None
    act_zero_point: Tensor | None = None
    counter: MacCounter | None = None
    groups: ChannelGroups | None = None
    saturation: LayerSaturation | None = None
    group_scale: Tensor | None = None
    branch: LowRankBranch | None = None

    def __post_init__(self) -> None:
        if self.scheme.is_grouped and self.groups is None:
            raise SchemeError(f"{self.name}: its codes are in channel groups, and the host passes none. Load the file with another host.")

    @property
    def operands(self) -> tuple[Kept] | None:
        """See kernels/repeat.py. None while multiply-adds are counted, which a repeated call would not do."""
        return None if self.counter is not None or self.groups is not None else (self._kept,)

    @cached_property
    def _kept(self) -> Kept:
        return Kept(self.qweight, self.weight_scale, self.weight_sums, self.bias, self.group_scale)

    @property
    def is_fp8(self) -> bool:
        return self.qweight.dtype is dispatch.FP8

    @property
    def code_dtype(self) -> torch.dtype:
        """Of the activation's codes."""
        return code_dtype(self.scheme)

    @property
    def is_static(self) -> bool:
        """Whether the stored scales are in use."""
        return self.scheme.is_static and self.act_scale is not None and not (self.saturation is not None and self.saturation.switched)

    @cached_property
    def dynamic_low(self) -> float | None:
        """The fixed low end of a dynamic scale per image; None if that is symmetric."""
        asymmetric = not self.scheme.symmetric and self.groups is None and self.weight_sums is not None
        return dynamic_low(self.name) if asymmetric else None

    @property
    def clipped(self) -> Tensor | None:
        """The counters of clipped values; None if nobody reads them."""
        # A compiled graph could not see the layer switch to dynamic scales.
        return None if self.saturation is None or torch.compiler.is_compiling() else self.saturation.counters

    @property
    def keeps_float_input(self) -> bool:
        return self.scheme.activation is ActivationMode.FP16 or self.scheme.compute is ComputeType.FP16

    @property
    def channel_order(self) -> Tensor | None:
        return None if self.groups is None else self.groups.order


def code_dtype(scheme: Scheme) -> torch.dtype:
    """Of the activation's codes that a layer takes, as a producer is asked for them."""
    if scheme.is_wide:
        return dispatch.WIDE
    return dispatch.FP8 if scheme.is_fp8 else torch.int8


def sums_of_codes(qweight: Tensor, groups: ChannelGroups | None = None, group_scale: Tensor | None = None) -> Tensor:
    """What a zero point is multiplied with: computed once per weight, not per call.

    Args: groups: of a layer with channel groups; codes then count times their group's 2^exponent. group_scale: of 4-bit weights,
        as the kernels take it; codes then count times their group's scale.
    Returns: int32 (N,) for Linear and 1x1; (16, Cout) for 3x3, one row per border class (kernels/int8_conv2d.py).
    """
    if group_scale is not None:
        return dispatch.expanded_codes(qweight, group_scale, 2 * qweight.shape[1]).sum(1, dtype=torch.int32)
    if qweight.ndim == 4 and qweight.shape[1:3] != (1, 1):
        return dispatch.border_sums(qweight) if groups is None else dispatch.grouped_border_sums(qweight, groups)
    codes = qweight if groups is None else dispatch.shifted_codes(qweight, groups)
    return codes.flatten(1).sum(1, dtype=torch.int32)


def linear(x: Tensor, layer: LayerTensors, bucket: Tensor) -> Tensor:
    """Linear layer.

    Args:
        x: (..., K) float; left unchanged.
        bucket: (B,) int64 in [0, 64) on x's device, one entry per sample of the batch, or (1,) for all. Rows belong to
            samples in order. Rows that B does not divide (nodes that drop or merge tokens across samples) are quantized
            per token instead, which needs no bucket.
    Returns: (..., N) in x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    y = _linear_rows(rows, layer, bucket)
    y = y if layer.branch is None else y + layer.branch.linear(rows)
    return y.view(*x.shape[:-1], y.shape[-1])


def conv2d(x: Tensor, layer: LayerTensors, bucket: Tensor, stride: int, padding: int) -> Tensor:
    """Conv2d with zero padding; 1x1 runs as a matrix product over pixels.

    Args:
        x: (B, Cin, H, W) float, any strides; left unchanged.
        bucket: as for linear; a batch that it does not divide is quantized per image.
        stride, padding: as a kernel takes them: stride 1 or 2, padding 0 or half the kernel.
    Returns: (B, Cout, Ho, Wo) in x's dtype.
    """
    kernel = layer.qweight.shape[1]
    if kernel == 1 and padding == 0:
        return _conv1x1(x[:, :, ::stride, ::stride], layer, bucket)
    if layer.keeps_float_input:
        weight = dequantize_weight(layer.qweight, layer.weight_scale, x.dtype, layer.channel_order)
        y = F.conv2d(x, weight, _bias_as(layer, x.dtype), stride, padding)
    elif layer.groups is not None:
        activation = dispatch.quantize_channel_group(x, layer.groups, _static_scale(layer, bucket, x.shape[0]))
        operands = (activation, layer.groups, layer.qweight, layer.weight_scale, layer.weight_sums, layer.bias)
        y = dispatch.channel_group_conv2d(*operands, stride, padding, out_dtype=x.dtype)
    else:
        y = code_convolution(_quantized_images(x, layer, bucket), layer, x.dtype, stride, padding)
    count_macs(layer, y.numel() * layer.qweight[0].numel(), x.device)
    return y


def _quantized_images(x: Tensor, layer: LayerTensors, bucket: Tensor) -> QuantizedActivation | WideActivation:
    """By the stored scales, or without them per image."""
    if layer.scheme.is_wide:
        return dispatch.quantize_wide(x)
    if layer.is_static and x.shape[0] % bucket.numel() == 0:
        return dispatch.quantize_static(x, layer.act_scale, layer.act_zero_point, bucket, layer.clipped)
    return dispatch.quantize_image(x, layer.dynamic_low, layer.code_dtype)


def _conv1x1(x: Tensor, layer: LayerTensors, bucket: Tensor) -> Tensor:
    B, _, H, W = x.shape
    pixels = x.permute(0, 2, 3, 1)  # (B, H, W, Cin)
    y = _linear_rows(pixels.reshape(B * H * W, -1), layer, bucket if B % bucket.numel() == 0 else None)
    return y.view(B, H, W, -1).permute(0, 3, 1, 2)


def _linear_rows(rows: Tensor, layer: LayerTensors, bucket: Tensor | None) -> Tensor:
    """(M, K) -> (M, N). bucket None: no entry fits the rows."""
    qweight = layer.qweight.flatten(1)  # (N, K): a 1x1 conv's codes too
    if layer.group_scale is not None:
        y = int4_product(rows if layer.keeps_float_input else _quantized_rows(rows, layer, bucket), layer, rows.dtype)
    elif layer.keeps_float_input:
        weight = dequantize_weight(qweight, layer.weight_scale, rows.dtype, layer.channel_order)
        y = F.linear(rows, weight, _bias_as(layer, rows.dtype))
    elif layer.groups is not None:
        activation = dispatch.quantize_channel_group(rows, layer.groups, _static_scale(layer, bucket, rows.shape[0]))
        operands = (activation, layer.groups, qweight, layer.weight_scale, layer.weight_sums, layer.bias)
        y = dispatch.channel_group_gemm(*operands, out_dtype=rows.dtype)
    else:
        y = code_product(_quantized_rows(rows, layer, bucket), layer, rows.dtype)
    count_macs(layer, rows.numel() * qweight.shape[0], rows.device)
    return y


def _quantized_rows(rows: Tensor, layer: LayerTensors, bucket: Tensor | None) -> QuantizedActivation | WideActivation:
    """By the stored scales, or without them per token."""
    if layer.scheme.is_wide:
        return dispatch.quantize_wide(rows)
    if layer.is_static and bucket is not None and rows.shape[0] % bucket.numel() == 0:
        return dispatch.quantize_static(rows, layer.act_scale, layer.act_zero_point, bucket, layer.clipped)
    return dispatch.quantize_token(rows, layer.code_dtype)


def code_product(
    rows: QuantizedActivation | WideActivation, layer: LayerTensors, dtype: torch.dtype, addend: Tensor | None = None
) -> Tensor:
    """A Linear or 1x1 convolution with 8-bit weights on their kind of codes (M, K) -> (M, N) dtype. addend: as int4_product's."""
    if isinstance(rows, WideActivation):
        addend = code_product(rows.low, replace(layer, bias=None), between_planes(dtype), addend)
        return code_product(rows.high, layer, dtype, addend)
    qweight = layer.qweight.flatten(1)  # (N, K): a 1x1 conv's codes too
    if layer.is_fp8:
        return dispatch.fp8_gemm(rows, qweight, layer.weight_scale, layer.bias, out_dtype=dtype, addend=addend)
    return dispatch.int8_gemm(rows, qweight, layer.weight_scale, layer.weight_sums, layer.bias, out_dtype=dtype, addend=addend)


def code_convolution(
    images: QuantizedActivation | WideActivation,
    layer: LayerTensors,
    dtype: torch.dtype,
    stride: int,
    padding: int,
    addend: Tensor | None = None,
) -> Tensor:
    """A 3x3 convolution on its kind of codes (B, H, W, C) -> (B, Cout, Ho, Wo) dtype, channels_last. addend: as of fused.convolution."""
    if isinstance(images, WideActivation):
        addend = code_convolution(images.low, replace(layer, bias=None), between_planes(dtype), stride, padding, addend)
        return code_convolution(images.high, layer, dtype, stride, padding, addend)
    options = {"out_dtype": dtype, "addend": addend}
    if layer.is_fp8:
        return dispatch.fp8_conv2d(images, layer.qweight, layer.weight_scale, layer.bias, stride, padding, **options)
    return dispatch.int8_conv2d(images, layer.qweight, layer.weight_scale, layer.weight_sums, layer.bias, stride, padding, **options)


def between_planes(dtype: torch.dtype) -> torch.dtype:
    """Of the low plane's product, which the high plane's is added to: bf16 would lose what the low plane is for."""
    return torch.float16 if dtype is torch.float16 else torch.float32


def int4_product(rows: Tensor | QuantizedActivation, layer: LayerTensors, dtype: torch.dtype, addend: Tensor | None = None) -> Tensor:
    """A Linear with 4-bit weights on codes or floats (M, K) -> (M, N) dtype. addend: (M, N) contiguous, any float dtype."""
    operands = (rows, layer.qweight, layer.group_scale, layer.weight_scale, layer.weight_sums, layer.bias)
    return dispatch.int4_gemm(*operands, out_dtype=dtype, addend=addend)


def _static_scale(layer: LayerTensors, bucket: Tensor | None, units: int) -> StaticScale | None:
    """The layer's stored scales; None for dynamic ones, also where the samples cannot be told from the units (images or rows)."""
    if not layer.is_static or bucket is None or units % bucket.numel():
        return None
    return StaticScale(layer.act_scale, layer.act_zero_point, bucket, layer.clipped)


def _bias_as(layer: LayerTensors, dtype: torch.dtype) -> Tensor | None:
    return None if layer.bias is None else layer.bias.to(dtype)


def count_macs(layer: LayerTensors, macs: int, device: torch.device) -> None:
    """Tell the layer's counter, if it has one, of a call's multiply-adds, and whether they ran as integers."""
    if layer.counter is not None:
        choose = dispatch.choose_fp8_backend if layer.is_fp8 else dispatch.choose_backend
        integer = not layer.keeps_float_input and choose(device).backend.is_integer
        layer.counter.record(layer.name, macs, integer)
