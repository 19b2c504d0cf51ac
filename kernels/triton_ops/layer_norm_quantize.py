"""Triton kernel of layer_norm_quantize: a row stays in registers, is read once and written once. Formula: ../layer_norm_quantize.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..layer_norm_quantize import check_layer_norm
from ..quantize_token import TINY
from ..repeat import empty, launch
from ..static_scale import StaticScale, check_static_codes
from .clipping import add_clipped, count_beyond
from .encoding import reciprocal, static_entry
from .launch import cdiv, on_device
from .packed_codes import pack_codes, row_absmax, shifted_ratio
from .rounding import dynamic_scale
from .row_parts import is_even, load_row, load_vector, neighbours, row_warps, rows_per_program, split_row, store_row
from .scale_entries import scale_entries


@triton.jit
def _layer_norm_quantize_kernel(
    x_ptr, weight_ptr, bias_ptr, codes_ptr, float_ptr, scale_ptr, zero_point_ptr,
    table_ptr, zero_table_ptr, bucket_ptr, clipped_ptr,
    M, K, eps, rows_per_scale, stride_xm,
    STATIC: tl.constexpr, HAS_ZERO_POINT: tl.constexpr, KEEP_FLOAT: tl.constexpr, TINY: tl.constexpr,
    BLOCK_M: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, EVEN: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    CODES: tl.constexpr = codes_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_m = rows < M
    inside = inside_m[:, None]
    head, tail = load_row(x_ptr + rows[:, None] * stride_xm, K, inside, HEAD, TAIL, EVEN, VECTOR)
    if STATIC:  # three loads, each waiting for the one before: beside those of x
        first = inside_m & (rows % rows_per_scale == 0)
        scale, zero_point = static_entry(
            table_ptr, zero_table_ptr, bucket_ptr, scale_ptr, zero_point_ptr, rows // rows_per_scale, inside_m, first, HAS_ZERO_POINT
        )

    mean = (tl.sum(head, axis=1) + tl.sum(tail, axis=1)) / K
    head -= mean[:, None]
    tail -= mean[:, None]
    if not EVEN:
        tail = tl.where(tl.arange(0, TAIL)[None, :] < K - HEAD, tail, 0.0)
    # From the differences, not from the sum of squares, which cancels when the mean is large.
    variance = (tl.sum(head * head, axis=1) + tl.sum(tail * tail, axis=1)) / K
    inverse_std = (1.0 / tl.sqrt_rn(variance + eps))[:, None]
    weight_head, weight_tail = load_vector(weight_ptr, K, HEAD, TAIL, EVEN, VECTOR)
    bias_head, bias_tail = load_vector(bias_ptr, K, HEAD, TAIL, EVEN, VECTOR)
    head = head * inverse_std * weight_head + bias_head
    tail = tail * inverse_std * weight_tail + bias_tail
    if KEEP_FLOAT:
        store_row(float_ptr + rows[:, None] * K, K, inside, head, tail, HEAD, TAIL, EVEN, VECTOR)

    if not STATIC:
        scale = dynamic_scale(row_absmax(head, tail), TINY, CODES)
        tl.store(scale_ptr + rows, scale, mask=inside_m)
    inverse = reciprocal(scale)[:, None]
    head *= inverse
    tail *= inverse
    if STATIC:
        if clipped_ptr is not None:
            clipped = count_beyond(head, inside, zero_point[:, None], HAS_ZERO_POINT)
            clipped += count_beyond(tail, inside, zero_point[:, None], HAS_ZERO_POINT)
            add_clipped(clipped_ptr, clipped, M, tl.program_id(0) == 0)
        head = shifted_ratio(head, zero_point[:, None], HAS_ZERO_POINT)
        tail = shifted_ratio(tail, zero_point[:, None], HAS_ZERO_POINT)
    code_ptr = codes_ptr + rows[:, None] * K
    store_row(code_ptr, K, inside, pack_codes(head, CODES), pack_codes(tail, CODES), HEAD, TAIL, EVEN, VECTOR)
    if STATIC and HAS_ZERO_POINT:  # a row with a NaN or an infinity is NaN throughout: read as 0, whose code is the zero point
        lost = inside & (variance != variance)[:, None]
        head = tl.broadcast_to(zero_point.to(CODES)[:, None], (BLOCK_M, HEAD))
        tail = tl.broadcast_to(zero_point.to(CODES)[:, None], (BLOCK_M, TAIL))
        store_row(code_ptr, K, lost, head, tail, HEAD, TAIL, False, VECTOR)


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    static: StaticScale | None = None,
    keep_float: bool = False,
    dtype: torch.dtype = torch.int8,
) -> tuple[QuantizedActivation, Tensor | None]:
    """See layer_norm_quantize_ref: scales to fp32 rounding, codes at most 1 apart and that on fewer than 1 in 1000."""
    check_layer_norm(x, weight, bias)
    check_static_codes("layer_norm_quantize", static, dtype)
    x = x if x.stride(1) == 1 else x.contiguous()
    M, K = x.shape
    entries = scale_entries("layer_norm_quantize", static, M, M, 1, x.device)
    codes = empty((M, K), dtype, x.device)
    y = empty((M, K), x.dtype, x.device) if keep_float else None
    head, tail = split_row(K)
    block_m = rows_per_program(K)
    with on_device(x):
        launch(
            _layer_norm_quantize_kernel, (cdiv(M, block_m),),
            x, weight.contiguous(), bias.contiguous(), codes, codes if y is None else y, entries.scale, entries.zero_point_or_scale,
            *entries.tables, entries.clipped, M, K, eps, entries.rows_per_scale, x.stride(0),
            STATIC=static is not None, HAS_ZERO_POINT=entries.zero_point is not None, KEEP_FLOAT=keep_float, TINY=TINY,
            BLOCK_M=block_m, HEAD=head, TAIL=tail, EVEN=is_even(K), VECTOR=neighbours(K), num_warps=row_warps(K),
        )  # fmt: skip
    return QuantizedActivation(codes, entries.scale, entries.zero_point, entries.rows_per_scale), y
