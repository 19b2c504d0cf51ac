"""Which plain torch function stands for each operation, exact or without integer compute. Routing: dispatch.py; kernels: triton_ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .attention import attention_ref
from .channel_group_conv2d import channel_group_conv2d_ref
from .channel_group_dequantized import dequantized_channel_group_conv2d, dequantized_channel_group_gemm
from .channel_group_gemm import channel_group_gemm_ref
from .dequantized import (
    dequantized_conv2d,
    dequantized_fp8_conv2d,
    dequantized_fp8_geglu_gemm,
    dequantized_fp8_gemm,
    dequantized_fp8_gemm_many,
    dequantized_geglu_gemm,
    dequantized_gemm,
    dequantized_gemm_many,
    dequantized_upsample_conv2d,
)
from .fp8_conv2d import fp8_conv2d_ref
from .fp8_geglu_gemm import fp8_geglu_gemm_ref
from .fp8_gemm import fp8_gemm_ref
from .fp8_gemm_many import fp8_gemm_many_ref
from .geglu_quantize import geglu_quantize_ref
from .group_norm_silu import group_norm_silu_ref
from .group_norm_silu_quantize import group_norm_silu_quantize_ref
from .int4_expand import int4_expand_ref
from .int4_geglu_gemm import dequantized_int4_geglu_gemm, int4_geglu_gemm_ref
from .int4_gemm import dequantized_int4_gemm, int4_gemm_ref
from .int4_gemm_many import dequantized_int4_gemm_many, int4_gemm_many_ref
from .int8_conv2d import int8_conv2d_ref
from .int8_geglu_gemm import int8_geglu_gemm_ref
from .int8_gemm import int8_gemm_ref
from .int8_gemm_many import int8_gemm_many_ref
from .int8_upsample_conv2d import int8_upsample_conv2d_ref
from .layer_norm_quantize import layer_norm_quantize_ref
from .log2_attention import int8_attention_ref, log2_attention_ref
from .quantize_channel_group import quantize_channel_group_ref
from .quantize_image import quantize_image_ref
from .quantize_joined import quantize_joined_ref
from .quantize_static import quantize_static_ref
from .quantize_token import quantize_token_ref
from .quantize_wide import quantize_wide_ref

REFERENCE: dict[str, Callable[..., Any]] = {
    "quantize_token": quantize_token_ref,
    "quantize_image": quantize_image_ref,
    "quantize_static": quantize_static_ref,
    "quantize_channel_group": quantize_channel_group_ref,
    "quantize_joined": quantize_joined_ref,
    "quantize_wide": quantize_wide_ref,
    "layer_norm_quantize": layer_norm_quantize_ref,
    "group_norm_silu": group_norm_silu_ref,
    "group_norm_silu_quantize": group_norm_silu_quantize_ref,
    "geglu_quantize": geglu_quantize_ref,
    "int4_expand": int4_expand_ref,
    "int4_gemm": int4_gemm_ref,
    "int4_gemm_many": int4_gemm_many_ref,
    "int4_geglu_gemm": int4_geglu_gemm_ref,
    "int8_gemm": int8_gemm_ref,
    "int8_gemm_many": int8_gemm_many_ref,
    "int8_geglu_gemm": int8_geglu_gemm_ref,
    "int8_conv2d": int8_conv2d_ref,
    "int8_upsample_conv2d": int8_upsample_conv2d_ref,
    "channel_group_gemm": channel_group_gemm_ref,
    "channel_group_conv2d": channel_group_conv2d_ref,
    "log2_attention": log2_attention_ref,
    "int8_attention": int8_attention_ref,
    "attention": attention_ref,
    "fp8_gemm": fp8_gemm_ref,
    "fp8_gemm_many": fp8_gemm_many_ref,
    "fp8_geglu_gemm": fp8_geglu_gemm_ref,
    "fp8_conv2d": fp8_conv2d_ref,
}
DEQUANTIZED = {
    **REFERENCE,
    "int4_gemm": dequantized_int4_gemm,
    "int4_gemm_many": dequantized_int4_gemm_many,
    "int4_geglu_gemm": dequantized_int4_geglu_gemm,
    "int8_gemm": dequantized_gemm,
    "int8_gemm_many": dequantized_gemm_many,
    "int8_geglu_gemm": dequantized_geglu_gemm,
    "int8_conv2d": dequantized_conv2d,
    "int8_upsample_conv2d": dequantized_upsample_conv2d,
    "channel_group_gemm": dequantized_channel_group_gemm,
    "channel_group_conv2d": dequantized_channel_group_conv2d,
    "fp8_gemm": dequantized_fp8_gemm,
    "fp8_gemm_many": dequantized_fp8_gemm_many,
    "fp8_geglu_gemm": dequantized_fp8_geglu_gemm,
    "fp8_conv2d": dequantized_fp8_conv2d,
}
