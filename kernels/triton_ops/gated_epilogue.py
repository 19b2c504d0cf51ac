"""Device functions that turn a tile of sums, values beside their gates, into the stored result of GEGLU: floats or static codes."""

import triton
import triton.language as tl

from .activations import gelu_erf
from .clipping import add_clipped, beyond_codes, count
from .encoding import encode, reciprocal, static_entry
from .epilogue import halves, in_parts
from .gemm_kernel import scaled_sums
from .rounding import ROUND_MAGIC


@triton.jit
def _projected(
    acc, scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, bias_end, rows, rows_per_scale, columns, inside_m, inside_n
):
    """The Linear layer's result, fp32. bias_end: 2N, or 0 if there is no bias."""
    y = scaled_sums(acc, scale_ptr, zero_point_ptr, weight_sum_ptr, 0, rows, rows_per_scale, columns, inside_m, inside_n)
    y = y * tl.load(weight_scale_ptr + columns, mask=inside_n, other=0.0)[None, :]
    return y + tl.load(bias_ptr + columns, mask=inside_n & (columns < bias_end), other=0.0).to(tl.float32)[None, :]


@triton.jit
def _gated(
    values, gates, scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, bias_end, rows, rows_per_scale, columns, N,
    inside_m, inside_n,
):  # fmt: skip
    """value * gelu(gate), fp32, of some of a tile's columns. bias_end: 2N, or 0 if there is no bias."""
    gate = _projected(
        gates, scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, bias_end, rows, rows_per_scale, N + columns,
        inside_m, inside_n,
    )  # fmt: skip
    return gelu_erf(gate) * _projected(
        values, scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, bias_end, rows, rows_per_scale, columns,
        inside_m, inside_n,
    )  # fmt: skip


@triton.jit
def _int8_codes(y, inverse, zero_points, HAS_ZERO_POINT: tl.constexpr):
    """encoding.encode's int8 codes, and where they were clamped, as clipping.beyond_codes says but for ties, in fewer instructions.

    The zero point is part of the number that is added to round: one multiply-add, and what is clamped is compared with constants.
    """
    zero = ROUND_MAGIC + zero_points.to(tl.float32)
    rounded = y * inverse + zero
    rounded = tl.where(rounded == rounded, rounded, zero)
    lowest: tl.constexpr = ROUND_MAGIC - 128.0 if HAS_ZERO_POINT else ROUND_MAGIC - 127.0
    clamped = tl.minimum(tl.maximum(rounded, lowest), ROUND_MAGIC + 127.0)
    return clamped.to(tl.int32, bitcast=True).to(tl.int8), clamped != rounded


@triton.jit
def gated_codes(y, inverse, zero_points, HAS_ZERO_POINT: tl.constexpr, CODES: tl.constexpr):
    """Codes of type CODES, and where they were clamped."""
    if tl.int8 == CODES:
        codes, is_beyond = _int8_codes(y, inverse, zero_points, HAS_ZERO_POINT)
    else:
        is_beyond = beyond_codes(y, inverse, zero_points, HAS_ZERO_POINT)
        codes = encode(y, inverse, zero_points, HAS_ZERO_POINT, CODES)
    return codes, is_beyond


@triton.jit
def store_gated(
    acc, y_ptr, tile_m, tile_n, first_m, first_n, scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, has_bias,
    table_ptr, zero_table_ptr, bucket_ptr, out_scale_ptr, out_zero_point_ptr, clipped_ptr, M, N, rows_per_scale, rows_per_entry,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store value * gelu(gate) of acc (BLOCK_M, BLOCK_N): BLOCK_N / 2 values from column first_n on, then their gates.

    Args: N: counts the values. With a table_ptr codes are stored, and their entries' scales and zero points in out_scale_ptr and
        out_zero_point_ptr. clipped_ptr: see clipping.py; None counts nothing.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    WIDTH: tl.constexpr = HALF // PARTS
    local_m = tl.arange(0, BLOCK_M)
    inside_m = local_m < M - first_m
    rows = first_m + local_m
    values, gates = halves(acc, BLOCK_M, BLOCK_N)
    value_parts = in_parts(values, PARTS, BLOCK_M, HALF)
    gate_parts = in_parts(gates, PARTS, BLOCK_M, HALF)
    local_n = tl.arange(0, WIDTH)
    bias_end = has_bias * 2 * N
    if table_ptr is not None:
        HAS_ZERO_POINT: tl.constexpr = zero_table_ptr is not None
        local_rows = rows.to(tl.int32)
        entry = local_rows // rows_per_entry
        first = inside_m & (local_rows % rows_per_entry + tile_n == 0)
        out_scale, out_zero_point = static_entry(
            table_ptr, zero_table_ptr, bucket_ptr, out_scale_ptr, out_zero_point_ptr, entry, inside_m, first, HAS_ZERO_POINT
        )
        # 0 for rows outside: what they hold is clamped nowhere, and so not counted. Columns outside have weight_scale 0.
        inverse = tl.where(inside_m, reciprocal(out_scale), 0.0)[:, None]
        zero_points = out_zero_point[:, None]
    if clipped_ptr is not None:
        beyond = tl.zeros((BLOCK_M, WIDTH), tl.int32)  # by place in a part: one reduction, after the last
    for part in tl.static_range(PARTS):
        part_n = first_n + part * WIDTH
        y = _gated(
            value_parts[part], gate_parts[part], scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, bias_end,
            rows, rows_per_scale, part_n + local_n, N, inside_m, local_n < N - part_n,
        )  # fmt: skip
        inside = inside_m[:, None] & (local_n < N - part_n)[None, :]
        if table_ptr is not None:
            y, is_beyond = gated_codes(y, inverse, zero_points, HAS_ZERO_POINT, y_ptr.dtype.element_ty)
            if clipped_ptr is not None:
                beyond += is_beyond.to(tl.int32)
        tl.store(y_ptr + (first_m * N + part_n) + local_m[:, None] * N + local_n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    if clipped_ptr is not None:
        add_clipped(clipped_ptr, count(beyond), M, tile_m + tile_n == 0)
