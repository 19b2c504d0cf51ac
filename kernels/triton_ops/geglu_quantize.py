"""Triton kernel of geglu_quantize: both halves of a row are read once, the codes written once. Formula: ../geglu_quantize.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..geglu_quantize import check_geglu
from ..quantize_token import TINY
from ..repeat import empty, launch
from ..static_scale import StaticScale, check_static_codes
from .activations import gelu_erf
from .clipping import add_clipped, beyond_codes, count
from .encoding import encode, reciprocal, static_entry
from .launch import cdiv, on_device
from .rounding import dynamic_scale, magnitude
from .row_parts import load_row, row_warps, rows_per_program, split_row, store_row
from .scale_entries import scale_entries


@triton.jit
def _geglu_quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_point_ptr,
    table_ptr, zero_table_ptr, bucket_ptr, clipped_ptr,
    M, N, rows_per_scale, stride_xm,
    STATIC: tl.constexpr, HAS_ZERO_POINT: tl.constexpr, TINY: tl.constexpr,
    BLOCK_M: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_m = rows < M
    inside = inside_m[:, None]
    value_ptr = x_ptr + rows[:, None] * stride_xm
    head, tail = load_row(value_ptr, N, inside, HEAD, TAIL)
    gate_head, gate_tail = load_row(value_ptr + N, N, inside, HEAD, TAIL)
    head *= gelu_erf(gate_head)
    tail *= gelu_erf(gate_tail)

    if STATIC:
        first = inside_m & (rows % rows_per_scale == 0)
        scale, zero_point = static_entry(
            table_ptr, zero_table_ptr, bucket_ptr, scale_ptr, zero_point_ptr, rows // rows_per_scale, inside_m, first, HAS_ZERO_POINT
        )
    else:
        absmax = tl.maximum(tl.max(magnitude(head), axis=1), tl.max(magnitude(tail), axis=1))
        scale = dynamic_scale(absmax, TINY, codes_ptr.dtype.element_ty)
        zero_point = tl.zeros((BLOCK_M,), tl.int32)
        tl.store(scale_ptr + rows, scale, mask=inside_m)
    inverse = reciprocal(scale)[:, None]
    if clipped_ptr is not None:
        clipped = count(inside & beyond_codes(head, inverse, zero_point[:, None], HAS_ZERO_POINT))
        clipped += count(inside & beyond_codes(tail, inverse, zero_point[:, None], HAS_ZERO_POINT))
        add_clipped(clipped_ptr, clipped, M, tl.program_id(0) == 0)
    head = encode(head, inverse, zero_point[:, None], HAS_ZERO_POINT, codes_ptr.dtype.element_ty)
    tail = encode(tail, inverse, zero_point[:, None], HAS_ZERO_POINT, codes_ptr.dtype.element_ty)
    store_row(codes_ptr + rows[:, None] * N, N, inside, head, tail, HEAD, TAIL)


def geglu_quantize(x: Tensor, static: StaticScale | None = None, dtype: torch.dtype = torch.int8) -> QuantizedActivation:
    """See geglu_quantize_ref: scales within 3e-5 (gelu_erf's error), codes at most 1 apart and that on fewer than 1 in 1000."""
    check_geglu(x)
    check_static_codes("geglu_quantize", static, dtype)
    x = x if x.stride(1) == 1 else x.contiguous()
    M, N = x.shape[0], x.shape[1] // 2
    entries = scale_entries("geglu_quantize", static, M, M, 1, x.device)
    codes = empty((M, N), dtype, x.device)
    head, tail = split_row(N)
    block_m = rows_per_program(N)
    with on_device(x):
        launch(
            _geglu_quantize_kernel, (cdiv(M, block_m),),
            x, codes, entries.scale, entries.zero_point_or_scale, *entries.tables, entries.clipped,
            M, N, entries.rows_per_scale, x.stride(0),
            STATIC=static is not None, HAS_ZERO_POINT=entries.zero_point is not None, TINY=TINY,
            BLOCK_M=block_m, HEAD=head, TAIL=tail, num_warps=row_warps(N),
        )  # fmt: skip
    return QuantizedActivation(codes, entries.scale, entries.zero_point, entries.rows_per_scale)
