"""The single dispatch point: every integer operation is called here and routed by its tensor's device."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .activation import FP8, WIDE, QuantizedActivation, WideActivation
from .backend import Backend, BackendChoice, choose_backend, choose_fp8_backend, forget_choices
from .channel_group import ChannelGroups, channel_groups, shifted_codes
from .channel_group_conv2d import grouped_border_sums
from .group_norm_silu_quantize import DynamicScale
from .implementations import DEQUANTIZED, REFERENCE
from .int4_gemm_many import Int4LinearWeight
from .int4_weight import expanded_codes, paired_scales
from .int8_conv2d import border_sums
from .int8_gemm_many import LinearWeight
from .int8_upsample_conv2d import PhaseWeight, phase_weight
from .repeat import Kept, Repeated, call
from .static_scale import StaticScale

__all__ = [
    "FP8", "OPERATIONS", "WIDE", "Backend", "BackendChoice", "ChannelGroups", "DynamicScale", "Int4LinearWeight", "Kept", "LinearWeight",
    "PhaseWeight", "QuantizedActivation", "Repeated", "StaticScale", "WideActivation", "attention", "border_sums", "call",
    "channel_group_conv2d", "channel_group_gemm", "channel_groups", "choose_backend", "choose_fp8_backend", "compile_ahead",
    "expanded_codes", "expands_int4", "forget_choices", "fp8_conv2d", "fp8_geglu_gemm", "fp8_gemm", "fp8_gemm_many", "geglu_quantize",
    "group_norm_silu", "group_norm_silu_quantize", "grouped_border_sums", "has_attention", "int4_expand", "int4_geglu_gemm", "int4_gemm",
    "int4_gemm_many", "int8_attention", "int8_conv2d", "int8_geglu_gemm", "int8_gemm", "int8_gemm_many", "int8_upsample_conv2d",
    "layer_norm_quantize", "log2_attention", "paired_scales", "phase_weight", "quantize_channel_group", "quantize_image", "quantize_joined",
    "quantize_static", "quantize_token", "quantize_wide", "shifted_codes",
]  # fmt: skip

OPERATIONS = tuple(REFERENCE)
_triton: dict[str, Callable[..., Any]] = {}


def _implementation(operation: str, device: torch.device, codes: torch.dtype = torch.int8) -> Callable[..., Any]:
    """codes: which of them the operation makes or takes."""
    backend = (choose_fp8_backend(device) if codes is FP8 else choose_backend(device)).backend
    if backend is Backend.TRITON:
        return _triton.get(operation) or _import_kernel(operation)
    return (REFERENCE if backend is Backend.REFERENCE else DEQUANTIZED)[operation]


def _import_kernel(operation: str) -> Callable[..., Any]:
    """Import Triton and one kernel at its first use: neither may cost anything before, nor be needed where it is absent."""
    module = importlib.import_module(f".triton_ops.{operation}", __package__)
    _triton[operation] = Repeated(getattr(module, operation))
    return _triton[operation]


def quantize_token(x: Tensor, dtype: torch.dtype = torch.int8, into: QuantizedActivation | None = None) -> QuantizedActivation:
    """One symmetric scale per row of x (M, K), codes of dtype; see quantize_token_ref."""
    return _implementation("quantize_token", x.device, dtype)(x, dtype, into)


def quantize_image(x: Tensor, low: float | None = None, dtype: torch.dtype = torch.int8) -> QuantizedActivation:
    """One scale per image of x (B, C, H, W), symmetric or of [low, largest], NHWC codes of dtype; see quantize_image_ref."""
    return _implementation("quantize_image", x.device, dtype)(x, low, dtype)


def quantize_static(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, bucket: Tensor, clipped: Tensor | None = None
) -> QuantizedActivation:
    """The stored scale of each sample's timestep bucket, for x (M, K) or (B, C, H, W); see quantize_static_ref."""
    return _implementation("quantize_static", x.device)(x, scale, zero_point, bucket, clipped)


def quantize_channel_group(x: Tensor, groups: ChannelGroups, static: StaticScale | None = None) -> QuantizedActivation:
    """x (M, K) or (B, K, H, W) in channel groups, channels in stored order; see quantize_channel_group_ref."""
    return _implementation("quantize_channel_group", x.device)(x, groups, static)


def quantize_wide(x: Tensor) -> WideActivation:
    """16-bit codes of x (M, K), a scale per row, or of images (B, C, H, W), one each, in two int8 planes; see quantize_wide_ref."""
    return _implementation("quantize_wide", x.device)(x)


def quantize_joined(
    first: Tensor, second: Tensor, static: StaticScale | None = None, dtype: torch.dtype = torch.int8
) -> QuantizedActivation:
    """The pixels of two images (B, C_i, H, W), joined along the channels, as codes (B * H * W, C); see quantize_joined_ref."""
    return _implementation("quantize_joined", first.device, dtype)(first, second, static, dtype)


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    static: StaticScale | None = None,
    keep_float: bool = False,
    dtype: torch.dtype = torch.int8,
) -> tuple[QuantizedActivation, Tensor | None]:
    """LayerNorm of x (M, K) as codes of dtype, and as floats if asked for; see layer_norm_quantize_ref."""
    return _implementation("layer_norm_quantize", x.device, dtype)(x, weight, bias, eps, static, keep_float, dtype)


def group_norm_silu_quantize(
    segments: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    silu: bool = True,
    static: Sequence[StaticScale] = (),
    dynamic: DynamicScale = DynamicScale.IMAGE,
    joined: bool = True,
    dtype: torch.dtype = torch.int8,
) -> list[QuantizedActivation] | list[WideActivation]:
    """GroupNorm and SiLU of 1 or 2 tensors (B, C_i, H, W) as NHWC codes of dtype; see group_norm_silu_quantize_ref."""
    implementation = _implementation("group_norm_silu_quantize", weight.device, dtype)
    return implementation(segments, weight, bias, eps, silu, static, dynamic, joined, dtype)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """GroupNorm and SiLU of x (B, C, H, W) as floats, channels_last; see group_norm_silu_ref."""
    return _implementation("group_norm_silu", x.device)(x, weight, bias, eps)


def geglu_quantize(x: Tensor, static: StaticScale | None = None, dtype: torch.dtype = torch.int8) -> QuantizedActivation:
    """GEGLU of x (M, 2N) as codes (M, N) of dtype; see geglu_quantize_ref."""
    return _implementation("geglu_quantize", x.device, dtype)(x, static, dtype)


def int8_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    second: QuantizedActivation | None = None,
    addend: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor | QuantizedActivation:
    """Linear layer on int8 codes -> (M, N) out_dtype, or codes; see int8_gemm_ref."""
    implementation = _implementation("int8_gemm", activation.codes.device)
    extras = {"second": second, "addend": addend, "out_scale": out_scale, "out_zero_point": out_zero_point}
    return implementation(activation, qweight, weight_scale, weight_sum, bias, out_dtype, **extras)


def int4_gemm(
    activation: QuantizedActivation | Tensor,
    qweight: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    addend: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor | QuantizedActivation:
    """Linear layer with 4-bit weights on int8 codes or floats -> (M, N) out_dtype, or codes; see int4_gemm_ref."""
    extras = {"addend": addend, "out_scale": out_scale, "out_zero_point": out_zero_point}
    operands = (activation, qweight, group_scale, weight_scale, weight_sum, bias, out_dtype)
    return _implementation("int4_gemm", qweight.device)(*operands, **extras)


def int4_expand(qweights: Sequence[Tensor], group_scales: Sequence[Tensor], K: int) -> list[Tensor]:
    """Up to six packed weights of a shape as int8 codes (N, K) each; see int4_expand_ref."""
    return _implementation("int4_expand", qweights[0].device)(qweights, group_scales, K)


def expands_int4(rows: int, device: torch.device) -> bool:
    """Whether products of so many rows with 4-bit weights write these out as int8 codes first: then several may be at once."""
    if device.type != "cuda" or choose_backend(device).backend is not Backend.TRITON:
        return False
    kernels = importlib.import_module(".triton_ops.int4_expand", __package__)
    return kernels.expands(rows, kernels.compute_capability(device))


def int4_gemm_many(
    activation: QuantizedActivation, weights: Sequence[Sequence[Tensor | None]], out_dtype: torch.dtype = torch.float16
) -> list[Tensor]:
    """Up to three Linear layers with 4-bit weights of one activation -> (M, N) out_dtype each; see int4_gemm_many_ref."""
    return _implementation("int4_gemm_many", activation.codes.device)(activation, weights, out_dtype)


def int4_geglu_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    static: StaticScale | None = None,
) -> Tensor | QuantizedActivation:
    """Linear layer with 4-bit weights and GEGLU on int8 codes -> (M, N) out_dtype, or codes; see int4_geglu_gemm_ref."""
    implementation = _implementation("int4_geglu_gemm", activation.codes.device)
    return implementation(activation, qweight, group_scale, weight_scale, weight_sum, bias, out_dtype, static=static)


def int8_gemm_many(
    activation: QuantizedActivation, weights: Sequence[Sequence[Tensor | None]], out_dtype: torch.dtype = torch.float16
) -> list[Tensor]:
    """Up to three Linear layers of one activation -> (M, N) out_dtype each, rows may lie apart; see int8_gemm_many_ref."""
    return _implementation("int8_gemm_many", activation.codes.device)(activation, weights, out_dtype)


def int8_geglu_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    static: StaticScale | None = None,
    codes: torch.dtype = torch.int8,
) -> Tensor | QuantizedActivation:
    """Linear layer and GEGLU on int8 codes -> (M, N) out_dtype, or codes, of a weight (2N, K); see int8_geglu_gemm_ref."""
    implementation = _implementation("int8_geglu_gemm", activation.codes.device, codes)
    return implementation(activation, qweight, weight_scale, weight_sum, bias, out_dtype, static=static, codes=codes)


def int8_conv2d(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    border_sums: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    out_dtype: torch.dtype = torch.float16,
    *,
    second: QuantizedActivation | None = None,
    addend: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor | QuantizedActivation:
    """Conv2d on int8 codes -> (B, Cout, Ho, Wo) out_dtype, channels_last, or codes; see int8_conv2d_ref."""
    implementation = _implementation("int8_conv2d", activation.codes.device)
    extras = {"second": second, "addend": addend, "out_scale": out_scale, "out_zero_point": out_zero_point}
    return implementation(activation, qweight, weight_scale, border_sums, bias, stride, padding, out_dtype, **extras)


def int8_upsample_conv2d(
    activation: QuantizedActivation,
    weight: PhaseWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    addend: Tensor | None = None,
) -> Tensor:
    """3x3 conv of the nearest-2x upsampled image -> (B, Cout, 2 H, 2 W) out_dtype; see int8_upsample_conv2d_ref."""
    return _implementation("int8_upsample_conv2d", activation.codes.device)(activation, weight, bias, out_dtype, addend=addend)


def channel_group_gemm(
    activation: QuantizedActivation,
    groups: ChannelGroups,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Linear layer on codes in channel groups -> (M, N) out_dtype; see channel_group_gemm_ref."""
    implementation = _implementation("channel_group_gemm", activation.codes.device)
    return implementation(activation, groups, qweight, weight_scale, weight_sum, bias, out_dtype)


def channel_group_conv2d(
    activation: QuantizedActivation,
    groups: ChannelGroups,
    qweight: Tensor,
    weight_scale: Tensor,
    border_sums: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Conv2d on codes in channel groups -> (B, Cout, Ho, Wo) out_dtype, channels_last; see channel_group_conv2d_ref."""
    implementation = _implementation("channel_group_conv2d", activation.codes.device)
    return implementation(activation, groups, qweight, weight_scale, border_sums, bias, stride, padding, out_dtype)


def log2_attention(q: Tensor, k: Tensor, v: Tensor, bits: int, start: Tensor | None = None) -> Tensor:
    """Attention of (B, h, T, d) with DGQ's log2 map -> (B, h, Tq, d) in q's dtype; see log2_attention_ref."""
    return _implementation("log2_attention", q.device)(q, k, v, bits, start)


def int8_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (B, h, T, d) with an int8 product of Q and K -> (B, h, Tq, d) in q's dtype; see int8_attention_ref."""
    return _implementation("int8_attention", q.device)(q, k, v)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, static: StaticScale | None = None) -> Tensor | QuantizedActivation:
    """Attention of q (B, T, h * d) to k and v (B, S, h * d) -> (B, T, h * d), or codes (B * T, h * d); see attention_ref."""
    return _implementation("attention", q.device)(q, k, v, heads, static)


def has_attention(q: Tensor, k: Tensor, heads: int) -> bool:
    """Whether `attention` is a kernel for these that is not slower than torch's own attention."""
    if choose_backend(q.device).backend is not Backend.TRITON:
        return False
    return importlib.import_module(".triton_ops.attention", __package__).is_faster(q, k, heads)


def fp8_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    second: QuantizedActivation | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """Linear layer on fp8 codes -> (M, N) out_dtype; see fp8_gemm_ref."""
    implementation = _implementation("fp8_gemm", activation.codes.device, FP8)
    return implementation(activation, qweight, weight_scale, bias, out_dtype, second=second, addend=addend)


def fp8_gemm_many(
    activation: QuantizedActivation, weights: Sequence[Sequence[Tensor | None]], out_dtype: torch.dtype = torch.float16
) -> list[Tensor]:
    """Up to three fp8 Linear layers of one activation -> (M, N) out_dtype each, rows may lie apart; see fp8_gemm_many_ref."""
    return _implementation("fp8_gemm_many", activation.codes.device, FP8)(activation, weights, out_dtype)


def fp8_geglu_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    static: StaticScale | None = None,
) -> QuantizedActivation:
    """Linear layer and GEGLU on fp8 codes -> codes (M, N) per token or by a known scale, of a weight (2N, K); see fp8_geglu_gemm_ref."""
    implementation = _implementation("fp8_geglu_gemm", activation.codes.device, FP8)
    return implementation(activation, qweight, weight_scale, bias, dtype, static=static)


def fp8_conv2d(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    out_dtype: torch.dtype = torch.float16,
    *,
    second: QuantizedActivation | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """Conv2d on fp8 codes -> (B, Cout, Ho, Wo) out_dtype, channels_last; see fp8_conv2d_ref."""
    implementation = _implementation("fp8_conv2d", activation.codes.device, FP8)
    return implementation(activation, qweight, weight_scale, bias, stride, padding, out_dtype, second=second, addend=addend)


def compile_ahead(work: Callable[[], object], device: torch.device) -> None:
    """Compile the kernels that `work` launches, several at a time; see triton_ops/compile_ahead.py. Nothing where there is no compiler.

    Args: work: is done with launches left out, so its results are arbitrary; what it stores must not be kept.
    """
    if device.type == "cuda" and choose_backend(device).backend is Backend.TRITON:
        module = importlib.import_module(".triton_ops.compile_ahead", __package__)
        module.compile_ahead(work, device)
