"""Gluon kernel of int8_gemm, fp8_gemm and their *_many: one program makes one output tile, of one of up to three weights."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..triton_ops.accumulate import chosen, tile_position
from .columns import column_vectors, halves, row_vectors, scaled, store_part
from .copies import copy_in, wait_for_copies_out
from .ring import start, sums

# Sizes whose value or divisibility must not make another compiled kernel: none of them is a stride.
RUNTIME_ONLY = ["M", "has_bias", "rows_per_scale"]


@gluon.jit
def _finish(
    acc, of_rows, vectors, m, n, y, addend, staged, arrived,
    HAS_ZERO_POINT: gl.constexpr, first: gl.constexpr, layout: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Scale and store COLUMNS columns. staged holds the addend, if there is one, once `arrived` says so."""
    result = scaled(acc, of_rows, vectors, HAS_ZERO_POINT, first, COLUMNS, layout)
    if addend is not None:
        mbarrier.wait(arrived, 0)
        result += staged.load(layout).to(gl.float32)
    store_part(result.to(y.dtype), y, m, n, staged)


@gluon.jit
def _copy_addend(addend, addend_rest, m, n, staged, staged_rest, arrived, PART_N: gl.constexpr, PARTS: gl.constexpr, REST_N: gl.constexpr):
    """Start the copies into what the results will be staged in."""
    mbarrier.init(arrived, count=1)
    rest_bytes: gl.constexpr = addend_rest.block_type.nbytes if REST_N else 0
    mbarrier.expect(arrived, PARTS * addend.block_type.nbytes + rest_bytes)
    for part in gl.static_range(PARTS):
        copy_in(addend, [m, n + part * PART_N], arrived, staged.index(part))
    if REST_N:
        copy_in(addend_rest, [m, n + PARTS * PART_N], arrived, staged_rest)


@gluon.jit
def _staging(y, y_rest, BLOCK_M: gl.constexpr, PART_N: gl.constexpr, PARTS: gl.constexpr, REST_N: gl.constexpr):
    """Shared memory for each part of the result, and a barrier for what is copied there."""
    staged = gl.allocate_shared_memory(y.dtype, [PARTS, BLOCK_M, PART_N], y.layout)
    staged_rest = staged
    if REST_N:
        staged_rest = gl.allocate_shared_memory(y.dtype, [BLOCK_M, REST_N], y_rest.layout)
    return staged, staged_rest, gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())


@gluon.jit(do_not_specialize=RUNTIME_ONLY)
def _gluon_gemm_kernel(
    codes, qweight_1, qweight_2, qweight_3, rest_1, rest_2, rest_3, y, y_rest, addend, addend_rest,
    scale_ptr, zero_point_ptr, weight_scale_1_ptr, weight_scale_2_ptr, weight_scale_3_ptr,
    weight_sum_1_ptr, weight_sum_2_ptr, weight_sum_3_ptr, bias_1_ptr, bias_2_ptr, bias_3_ptr, has_bias,
    M, N, K, rows_per_scale,
    WEIGHTS: gl.constexpr, ACC: gl.constexpr, EARLY: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, REST_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """codes, qweights, rests, y, addend: tensor descriptors. qweights and rests beyond the WEIGHTS that there are: None, as rests if
    REST_N is 0. N: columns of one weight; a tile's divide it if there are several. EARLY: the addend is copied before the products,
    which takes shared memory of its own; else into that of the stages, after them.
    """
    PARTS: gl.constexpr = 2
    PART_N: gl.constexpr = BLOCK_N // PARTS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 32])
    part_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, PART_N, 32])
    rest_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, REST_N if REST_N else 8, 32])
    tiles_n = gl.cdiv(N, BLOCK_N + REST_N)
    tile_m, tile_n = tile_position(gl.program_id(0), gl.cdiv(M, BLOCK_M), WEIGHTS * tiles_n, GROUP_M)
    m = tile_m * BLOCK_M
    which = 0
    if WEIGHTS > 1:
        which = tile_n // tiles_n
    n = (tile_n - which * tiles_n) * (BLOCK_N + REST_N)  # in its own weight
    y_n = which * N + n
    weights = (qweight_1,) if WEIGHTS == 1 else (qweight_1, qweight_2) if WEIGHTS == 2 else (qweight_1, qweight_2, qweight_3)
    rests = (rest_1,) if WEIGHTS == 1 else (rest_1, rest_2) if WEIGHTS == 2 else (rest_1, rest_2, rest_3)
    ring = start(K, codes, weights, rests, which, m, n, STAGES, BLOCK_M, BLOCK_N, REST_N, BLOCK_K)
    if EARLY:
        staged, staged_rest, arrived = _staging(y, y_rest, BLOCK_M, PART_N, PARTS, REST_N)
        _copy_addend(addend, addend_rest, m, y_n, staged, staged_rest, arrived, PART_N, PARTS, REST_N)
    HAS_ZERO_POINT: gl.constexpr = zero_point_ptr is not None
    scale_of = chosen(which, weight_scale_1_ptr, weight_scale_2_ptr, weight_scale_3_ptr)
    bias_of = chosen(which, bias_1_ptr, bias_2_ptr, bias_3_ptr)
    sum_of = scale_of
    if HAS_ZERO_POINT:
        sum_of = chosen(which, weight_sum_1_ptr, weight_sum_2_ptr, weight_sum_3_ptr)
    vectors = column_vectors(scale_of, sum_of, bias_of, has_bias, n, N, HAS_ZERO_POINT, BLOCK_N)
    rest_vectors = vectors
    if REST_N:
        rest_vectors = column_vectors(scale_of, sum_of, bias_of, has_bias, n + BLOCK_N, N, HAS_ZERO_POINT, REST_N)
    rows = m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, part_layout))
    of_rows = row_vectors(scale_ptr, zero_point_ptr, rows, rows_per_scale, rows < M)
    rest_rows = of_rows
    if REST_N:
        rows = m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, rest_layout))
        rest_rows = row_vectors(scale_ptr, zero_point_ptr, rows, rows_per_scale, rows < M)
    acc, rest = sums(
        ring, K, codes, weights, rests, which, m, n, layout, rest_layout, ACC, STAGES, BLOCK_M, BLOCK_N, REST_N, BLOCK_K
    )  # fmt: skip
    if not EARLY:
        staged, staged_rest, arrived = _staging(y, y_rest, BLOCK_M, PART_N, PARTS, REST_N)
        if addend is not None:
            _copy_addend(addend, addend_rest, m, y_n, staged, staged_rest, arrived, PART_N, PARTS, REST_N)
    if REST_N:  # first: its sums' registers are free then
        _finish(
            rest, rest_rows, rest_vectors, m, y_n + BLOCK_N, y_rest, addend_rest, staged_rest, arrived,
            HAS_ZERO_POINT, 0, rest_layout, REST_N,
        )  # fmt: skip
    parts = halves(acc, BLOCK_M, BLOCK_N, part_layout)
    for part in gl.static_range(PARTS):
        _finish(
            parts[part], of_rows, vectors, m, y_n + part * PART_N, y, addend, staged.index(part), arrived,
            HAS_ZERO_POINT, part * PART_N, part_layout, PART_N,
        )  # fmt: skip
    wait_for_copies_out(0)
    staged._keep_alive()
    staged_rest._keep_alive()
