"""Device functions of an epilogue's operands and results: vectors along the columns in shared memory, parts of a tile, stores."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from ..triton_ops.epilogue import load_rows
from .copies import copy_out


@gluon.jit
def column_vector(pointer, first, end, COLUMNS: gl.constexpr):
    """COLUMNS values in shared memory, from `first` on; 0 from `end` on.

    Read while the first products run: from the L2, tile by tile in the epilogue, each would be a miss (64 -> 54 us of a GEGLU).
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    local = gl.arange(0, COLUMNS, layout=layout)
    values = gl.load(pointer + first + local, mask=local < end - first, other=0)
    return gl.allocate_shared_memory(values.dtype, [COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [0]), values)


@gluon.jit
def column_vectors(scale_ptr, sum_ptr, bias_ptr, has_bias, first, end, HAS_ZERO_POINT: gl.constexpr, COLUMNS: gl.constexpr):
    """Weight scales, weight sums (scales again without a zero point) and biases."""
    scales = column_vector(scale_ptr, first, end, COLUMNS)
    biases = column_vector(bias_ptr, first, has_bias * end, COLUMNS)
    sums = scales
    if HAS_ZERO_POINT:
        sums = column_vector(sum_ptr, first, end, COLUMNS)
    return scales, sums, biases


@gluon.jit
def of_columns(vector, first: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """(1, COLUMNS): a vector's values from `first` on, where each thread needs them."""
    return gl.expand_dims(vector.slice(first, COLUMNS).load(gl.SliceLayout(0, layout)), 0)


@gluon.jit
def row_vectors(scale_ptr, zero_point_ptr, rows, rows_per_scale, inside):
    """Scale and zero point of each row, (BLOCK_M, 1); the scale again without zero points. Read before the products, to be there after."""
    entry = rows // rows_per_scale
    scale = load_rows(scale_ptr, entry, inside, 0.0)
    zero_point = scale
    if zero_point_ptr is not None:
        zero_point = load_rows(zero_point_ptr, entry, inside, 0)
    return gl.expand_dims(scale, 1), gl.expand_dims(zero_point, 1)


@gluon.jit
def scaled(acc, of_rows, vectors, HAS_ZERO_POINT: gl.constexpr, first: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """The Linear layer's result, fp32: scale[m] * (acc - zero_point[m] * weight_sum[n]) * weight_scale[n] + bias[n].

    of_rows: row_vectors. vectors: column_vectors, in which these columns begin at `first`.
    """
    scales, sums, biases = vectors
    scale, zero_point = of_rows
    if HAS_ZERO_POINT:
        acc -= zero_point * of_columns(sums, first, COLUMNS, layout)
    y = acc.to(gl.float32) * scale
    return y * of_columns(scales, first, COLUMNS, layout) + of_columns(biases, first, COLUMNS, layout).to(gl.float32)


@gluon.jit
def halves(tile, BLOCK_M: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """The left and the right half of a tile: registers stay where they are. layout: of a half."""
    left, right = tile.reshape([BLOCK_M, 2, COLUMNS // 2]).permute((0, 2, 1)).split()
    return gl.convert_layout(left, layout, assert_trivial=True), gl.convert_layout(right, layout, assert_trivial=True)


@gluon.jit
def joined(left, right, BLOCK_M: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """The reverse of halves. COLUMNS: of the whole."""
    whole = gl.join(left, right).permute((0, 2, 1)).reshape([BLOCK_M, COLUMNS])
    return gl.convert_layout(whole, layout, assert_trivial=True)


@gluon.jit
def store_part(y, descriptor, m, n, staged):
    """Start the store of y, by way of its own shared memory. The caller waits (wait_for_copies_out) while `staged` is kept alive."""
    staged.store(y)
    fence_async_shared()
    copy_out(descriptor, [m, n], staged)
