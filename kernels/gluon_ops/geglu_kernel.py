"""Gluon kernel of int8_geglu_gemm and fp8_geglu_gemm: half of a tile's columns are values, the other half their gates.

GELU and codes of a tile take about as long as its products. Two groups of warps make alternate tiles, one's epilogue under the other's
products, and a warp of its own copies the stages of one tile after the other (turns.py). One program runs on a multiprocessor, and
makes every num_programs-th tile. Two programs a multiprocessor, each with its own copies, took 56.9 us where this takes 45.1 (SDXL on an
H100, 2048x10240x1280): all their warps met at a barrier around each copy.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..triton_ops.accumulate import tile_position
from ..triton_ops.activations import gelu_erf
from ..triton_ops.clipping import add_clipped
from ..triton_ops.encoding import reciprocal, static_entry
from ..triton_ops.gated_epilogue import gated_codes
from .columns import halves, row_vectors, scaled, store_part
from .copies import wait_for_copies_out
from .turns import copy_tiles, finish_products, new_ring, start_products

# Sizes whose value or divisibility must not make another compiled kernel: none of them is a stride.
RUNTIME_ONLY = ["M", "has_bias", "rows_per_scale", "rows_per_entry"]
FIRST, SECOND = gl.constexpr(0), gl.constexpr(1)
# Registers a thread. A program has 65536: what the second group and the copying warp (and three that idle) leave is the first group's.
COPYING_REGISTERS = gl.constexpr(24)
GROUP_OF_4_REGISTERS, GROUP_OF_8_REGISTERS = gl.constexpr(232), gl.constexpr(112)


@gluon.jit
def _values_and_gates(pointer, first, end, N, HALF: gl.constexpr):
    """HALF entries from `first` on, and as many N later; 0 from `end` on."""
    local = gl.arange(0, 2 * HALF, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    return gl.load(pointer + first + local % HALF + local // HALF * N, mask=local % HALF < end - first, other=0)


@gluon.jit
def _load_columns(column_ptrs, has_bias, n, N, HAS_ZERO_POINT: gl.constexpr, HALF: gl.constexpr):
    """Weight scales, weight sums (scales again without a zero point) and biases of a tile's columns, in registers."""
    scale_ptr, sum_ptr, bias_ptr = column_ptrs
    scales = _values_and_gates(scale_ptr, n, N, N, HALF)
    sums = scales
    if HAS_ZERO_POINT:
        sums = _values_and_gates(sum_ptr, n, N, N, HALF)
    return scales, sums, _values_and_gates(bias_ptr, n, has_bias * N, N, HALF)


@gluon.jit
def _keep_columns(columns, vectors, HAS_ZERO_POINT: gl.constexpr):
    """Into shared memory, from where each thread reads its own. They were loaded before the products, and have arrived long since."""
    vectors[0].store(columns[0])
    if HAS_ZERO_POINT:
        vectors[1].store(columns[1])
    vectors[2].store(columns[2])


@gluon.jit
def _inverse_and_zero(coding, rows, inside, writes):
    """Of every row, (BLOCK_M, 1): 1 / scale and zero point of its codes, stored for the consumer where `writes`. 1 and 0 for floats."""
    table_ptr, zero_table_ptr, bucket_ptr, out_scale_ptr, out_zero_point_ptr, rows_per_entry = coding
    inverse = gl.full(rows.shape, 1.0, gl.float32, layout=rows.type.layout)
    zero_point = gl.full(rows.shape, 0, gl.int32, layout=rows.type.layout)
    if table_ptr is not None:
        scale, zero_point = static_entry(
            table_ptr, zero_table_ptr, bucket_ptr, out_scale_ptr, out_zero_point_ptr, rows // rows_per_entry, inside,
            writes & inside & (rows % rows_per_entry == 0), zero_table_ptr is not None,
        )  # fmt: skip
        # 0 for rows outside: what they hold is clamped nowhere, and so not counted. Columns outside have weight_scale 0.
        inverse = gl.where(inside, reciprocal(scale), 0.0)
    return gl.expand_dims(inverse, 1), gl.expand_dims(zero_point, 1)


@gluon.jit
def _of_half(rows, layout: gl.constexpr):
    return gl.convert_layout(rows, layout, assert_trivial=True)


@gluon.jit
def _finish(
    acc, vectors, row, y, m, n, staged, HAS_ZERO_POINT: gl.constexpr, CODED: gl.constexpr, CODED_AROUND: gl.constexpr,
    BLOCK_M: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Store value * gelu(gate) of HALF columns. Of every row, how many of its codes were clamped."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, HALF, 32])
    scale, zero_point, inverse, out_zero_point = row
    of_rows = (_of_half(scale, layout), _of_half(zero_point, layout))
    values, gates = halves(acc, BLOCK_M, 2 * HALF, layout)
    result = gelu_erf(scaled(gates, of_rows, vectors, HAS_ZERO_POINT, HALF, HALF, layout))
    result = result * scaled(values, of_rows, vectors, HAS_ZERO_POINT, 0, HALF, layout)
    clamped = gl.full([BLOCK_M], 0, gl.int32, layout=gl.SliceLayout(1, layout))
    if CODED:
        result, is_clamped = gated_codes(result, _of_half(inverse, layout), _of_half(out_zero_point, layout), CODED_AROUND, y.dtype)
        clamped = gl.sum(is_clamped.to(gl.int32), axis=1)
    store_part(result.to(y.dtype), y, m, n, staged)
    return clamped


@gluon.jit
def _make_tiles(
    who: gl.constexpr, ring, shared, y, row_ptrs, column_ptrs, has_bias, coding, clipped_ptr, M, N, K, rows_per_scale,
    ACC: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Every second tile of a program: the first, third ... or, if `who` is 1, the second, fourth ..."""
    staged, scales_s, sums_s, biases_s = shared
    vectors = (scales_s.index(who), sums_s.index(who), biases_s.index(who))
    HALF: gl.constexpr = BLOCK_N // 2
    HAS_ZERO_POINT: gl.constexpr = row_ptrs[1] is not None
    CODED: gl.constexpr = coding[0] is not None
    CODED_AROUND: gl.constexpr = coding[1] is not None
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 32])
    tiles_m, tiles_n = gl.cdiv(M, BLOCK_M), gl.cdiv(N, HALF)
    steps = gl.cdiv(K, BLOCK_K)
    clipped = gl.full([BLOCK_M], 0, gl.int32, layout=gl.SliceLayout(1, layout))
    turns = 0
    for tile in range(gl.program_id(0) + who * gl.num_programs(0), tiles_m * tiles_n, 2 * gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
        m = tile_m * BLOCK_M
        n = tile_n * HALF
        columns = _load_columns(column_ptrs, has_bias, n, N, HAS_ZERO_POINT, HALF)
        acc, last = start_products(ring, who, turns, steps, layout, ACC, STAGES, BLOCK_M, BLOCK_N)
        # Under the last step's products: one of these loads waits for another.
        rows = m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
        inside = rows < M
        scale, zero_point = row_vectors(row_ptrs[0], row_ptrs[1], rows, rows_per_scale, inside)
        inverse, out_zero_point = _inverse_and_zero(coding, rows, inside, tile_n == 0)
        row = (scale, zero_point, inverse, out_zero_point)
        acc = finish_products(acc, ring, last)
        turns = turns + 1  # counted: divided out of `tile` it would take the one register too many
        _keep_columns(columns, vectors, HAS_ZERO_POINT)
        wait_for_copies_out(0)  # of the group's tile before, from the same shared memory
        clamped = _finish(acc, vectors, row, y, m, n, staged.index(who), HAS_ZERO_POINT, CODED, CODED_AROUND, BLOCK_M, HALF)
        clipped += gl.convert_layout(clamped, rows.type.layout, assert_trivial=True)
    wait_for_copies_out(0)
    if clipped_ptr is not None:
        add_clipped(clipped_ptr, gl.sum(clipped, axis=0), M, gl.program_id(0) + who == 0)


@gluon.jit
def _two_vectors(pointer, COLUMNS: gl.constexpr):
    return gl.allocate_shared_memory(pointer.dtype.element_ty, [2, COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit(do_not_specialize=RUNTIME_ONLY)
def _gluon_geglu_kernel(
    codes, qweight, y, scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, has_bias,
    table_ptr, zero_table_ptr, bucket_ptr, out_scale_ptr, out_zero_point_ptr, clipped_ptr,
    M, N, K, rows_per_scale, rows_per_entry,
    ACC: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """codes, qweight, y: tensor descriptors. N counts the values. num_warps: of one group, 4 or 8.

    With a table_ptr codes are stored, and their entries' scales and zero points in out_scale_ptr and out_zero_point_ptr.
    """
    ring = new_ring(codes, qweight, STAGES, BLOCK_M, BLOCK_N, BLOCK_K)
    staged = gl.allocate_shared_memory(y.dtype, [2, BLOCK_M, BLOCK_N // 2], y.layout)
    scales_s, biases_s = _two_vectors(weight_scale_ptr, BLOCK_N), _two_vectors(bias_ptr, BLOCK_N)
    sums_s = scales_s
    if zero_point_ptr is not None:
        sums_s = _two_vectors(weight_sum_ptr, BLOCK_N)
    shared = (staged, scales_s, sums_s, biases_s)
    row_ptrs, column_ptrs = (scale_ptr, zero_point_ptr), (weight_scale_ptr, weight_sum_ptr, bias_ptr)
    coding = (table_ptr, zero_table_ptr, bucket_ptr, out_scale_ptr, out_zero_point_ptr, rows_per_entry)
    GROUP_REGISTERS: gl.constexpr = GROUP_OF_4_REGISTERS if gl.num_warps() == 4 else GROUP_OF_8_REGISTERS
    # The constants are named in each: in a tuple bound to a name they would become run-time values.
    gl.warp_specialize(
        [
            (_make_tiles, (FIRST, ring, shared, y, row_ptrs, column_ptrs, has_bias, coding, clipped_ptr, M, N, K, rows_per_scale,
                           ACC, GROUP_M, STAGES, BLOCK_M, BLOCK_N, BLOCK_K)),
            (_make_tiles, (SECOND, ring, shared, y, row_ptrs, column_ptrs, has_bias, coding, clipped_ptr, M, N, K, rows_per_scale,
                           ACC, GROUP_M, STAGES, BLOCK_M, BLOCK_N, BLOCK_K)),
            (copy_tiles, (codes, qweight, ring, M, N, K, GROUP_M, STAGES, BLOCK_M, BLOCK_N, BLOCK_K)),
        ],
        [gl.num_warps(), 1],
        [GROUP_REGISTERS, COPYING_REGISTERS],
    )  # fmt: skip
    for buffer in gl.static_range(len(ring)):
        ring[buffer]._keep_alive()
    for buffer in gl.static_range(len(shared)):
        shared[buffer]._keep_alive()
