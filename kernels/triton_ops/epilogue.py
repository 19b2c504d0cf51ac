"""Device functions that turn a tile of sums into the stored result: scales, zero points, bias, addend, int8 or float store.

An absent operand but the bias is a None pointer, which costs no instruction. Formulas: ../int8_gemm.py and ../finish.py.
"""

import triton
import triton.language as tl

from .rounding import round_half_even


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile. Finished one after the other, they need half the registers."""
    return tile.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()


@triton.jit
def in_parts(tile, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tuple of 1, 2 or 4 runs of the tile's columns."""
    if PARTS == 1:
        parts = (tile,)
    else:
        left, right = halves(tile, BLOCK_M, BLOCK_N)
        if PARTS == 2:
            parts = (left, right)
        else:
            first, second = halves(left, BLOCK_M, BLOCK_N // 2)
            third, fourth = halves(right, BLOCK_M, BLOCK_N // 2)
            parts = (first, second, third, fourth)
    return parts


@triton.jit
def load_rows(pointer, entry, inside_m, otherwise: tl.constexpr):
    """The entry of every row of the tile, (BLOCK_M,)."""
    return tl.load(pointer + entry, mask=inside_m, other=otherwise)


@triton.jit
def subtract_border(acc, zero_point, sums_ptr, columns, inside_n, N, top, bottom, left, right):
    """acc - zero_point[m] * border_sums[class(m), n], one class after the other.

    A gather of (BLOCK_M, BLOCK_N) sums, or all classes at once, would not fit in registers. Most tiles have few classes.
    Args: top, bottom, left, right: (BLOCK_M,) int32, 1 where the first/last row/column of taps is outside the image.
    """
    table = sums_ptr + columns
    acc -= zero_point[:, None] * tl.load(table, mask=inside_n, other=0)[None, :]
    border_class = 4 * top + 8 * bottom + left + 2 * right
    present = 4 * tl.max(top, axis=0) + 8 * tl.max(bottom, axis=0) + tl.max(left, axis=0) + 2 * tl.max(right, axis=0)
    for other_class in tl.range(1, 16, num_stages=1):
        if (other_class & present) == other_class:
            missing = tl.load(table + other_class * N, mask=inside_n, other=0) - tl.load(table, mask=inside_n, other=0)
            acc -= tl.where(border_class == other_class, zero_point, 0)[:, None] * missing[None, :]
    return acc


@triton.jit
def finish_tile(
    y, y_ptr, first_row, local_rows, first_n, local_n, inside_m, inside_n, N, weight_scale_offset,
    weight_scale_ptr, bias_ptr, has_bias, addend_ptr, rows_per_addend, out_scale_ptr, out_zero_point_ptr, rows_per_out_scale,
):  # fmt: skip
    """Store weight_scale[n] * y + bias[n] + addend[row, n], as floats or, with an out_scale, as int8 codes.

    Args: y: (BLOCK_M, BLOCK_N) fp32, the scaled sums. first_row: int64, a row of the output; local_rows: (BLOCK_M,) int32,
        this tile's rows relative to it. 64 bit in every element's offset would take as many registers as y itself.
        weight_scale_offset: where this tile's phase begins; 0 but in the upsampler.
    """
    columns = first_n + local_n
    weight_scale = tl.load(weight_scale_ptr + weight_scale_offset + columns, mask=inside_n, other=0.0)
    y = y * weight_scale[None, :]
    # A mask, not a second compiled kernel: without a bias bias_ptr is some valid address that is never read.
    y += tl.load(bias_ptr + columns, mask=columns < has_bias * N, other=0.0).to(tl.float32)[None, :]
    inside = inside_m[:, None] & inside_n[None, :]
    if addend_ptr is not None:
        rows = first_row.to(tl.int32)  # there are fewer than 2^31
        first = rows // rows_per_addend
        local = (rows + local_rows) // rows_per_addend - first
        addend_ptrs = addend_ptr + (first.to(tl.int64) * N + first_n) + local[:, None] * N + local_n[None, :]
        y += tl.load(addend_ptrs, mask=inside, other=0.0).to(tl.float32)
    store_tile(
        y, y_ptr, first_row, local_rows, first_n, local_n, inside_m, inside_n, N, out_scale_ptr, out_zero_point_ptr, rows_per_out_scale
    )


@triton.jit
def store_tile(
    y, y_ptr, first_row, local_rows, first_n, local_n, inside_m, inside_n, N, out_scale_ptr, out_zero_point_ptr, rows_per_out_scale
):
    """Store y as floats or, with an out_scale, as int8 codes. Arguments as of finish_tile."""
    inside = inside_m[:, None] & inside_n[None, :]
    if out_scale_ptr is not None:
        entry = (first_row.to(tl.int32) + local_rows) // rows_per_out_scale
        inverse = tl.div_rn(1.0, load_rows(out_scale_ptr, entry, inside_m, 1.0))
        codes = round_half_even(y * inverse[:, None])
        if out_zero_point_ptr is not None:
            codes = tl.maximum(codes + load_rows(out_zero_point_ptr, entry, inside_m, 0)[:, None], -128)
        else:
            codes = tl.maximum(codes, -127)
        y = tl.minimum(codes, 127)
    y_ptrs = y_ptr + (first_row * N + first_n) + local_rows[:, None] * N + local_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)
