"""Gluon kernel of int8_conv2d and fp8_conv2d with stride 1: implicit GEMM over NHWC, K in the order (tap, channel). See ring.py.

A tile's pixels are a box of one image, so its scale, zero point and time embedding are those of one entry.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..triton_ops.accumulate import tile_position
from .columns import column_vector, halves, of_columns
from .copies import copy_in, copy_out, wait_for_copies_out
from .ring import finished

# Sizes whose value or divisibility must not make another compiled kernel: none of them is a stride.
RUNTIME_ONLY = ["N", "C", "H", "W", "boxes_h", "boxes_w", "tiles_m", "has_bias", "has_addend", "has_residual", "images_per_scale"]


@gluon.jit
def _copy_step(
    step, steps, ring, codes, qweight, rest_weight, box, n, C,
    KERNEL: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, REST_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Start the copies of a step, if it is one: the box of pixels under its tap, outside the image zeros, and the tap's weights."""
    codes_s, weight_s, rest_s, ready = ring
    image, h, w = box
    slot = step % STAGES
    wanted = step < steps
    steps_per_tap = gl.cdiv(C, BLOCK_K)
    tap = step // steps_per_tap
    c = (step - tap * steps_per_tap) * BLOCK_K
    tap_h = tap // KERNEL
    barrier = ready.index(slot)
    mbarrier.expect(barrier, codes.block_type.nbytes + (BLOCK_N + REST_N) * BLOCK_K, wanted)
    copy_in(codes, [image, h + tap_h, w + (tap - tap_h * KERNEL), c], barrier, codes_s.index(slot), wanted)
    copy_in(qweight, [n, tap * C + c], barrier, weight_s.index(slot), wanted)
    if REST_N:
        copy_in(rest_weight, [n + BLOCK_N, tap * C + c], barrier, rest_s.index(slot), wanted)


@gluon.jit
def _start(
    steps, codes, qweight, rest_weight, box, n, C,
    KERNEL: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, REST_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """The ring, with copies of all but its last stage under way."""
    codes_s = gl.allocate_shared_memory(codes.dtype, [STAGES] + codes.block_shape, codes.layout)  # noqa: RUF005 (Triton has no stars)
    weight_s = gl.allocate_shared_memory(codes.dtype, [STAGES, BLOCK_N, BLOCK_K], qweight.layout)
    rest_s = weight_s
    if REST_N:
        rest_s = gl.allocate_shared_memory(codes.dtype, [STAGES, REST_N, BLOCK_K], rest_weight.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    ring = (codes_s, weight_s, rest_s, ready)
    for step in gl.static_range(STAGES - 1):
        _copy_step(step, steps, ring, codes, qweight, rest_weight, box, n, C, KERNEL, STAGES, BLOCK_N, REST_N, BLOCK_K)
    return ring


@gluon.jit
def _sums(
    acc, rest, steps, ring, codes, qweight, rest_weight, box, n, C,
    KERNEL: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, REST_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """acc (BLOCK_M, BLOCK_N) and rest (BLOCK_M, REST_N) with all products added; rest is meaningless if REST_N is 0."""
    codes_s, weight_s, rest_s, ready = ring
    for step in range(steps):
        slot = step % STAGES
        mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
        pixels = codes_s.index(slot).reshape([BLOCK_M, BLOCK_K])
        acc = warpgroup_mma(pixels, weight_s.index(slot).permute((1, 0)), acc, is_async=True)
        # This step's products stay in flight; the one's before are done, and its stage can be filled again.
        if REST_N:
            rest = warpgroup_mma(pixels, rest_s.index(slot).permute((1, 0)), rest, is_async=True)
            acc, rest = warpgroup_mma_wait(2, deps=(acc, rest))
        else:
            acc = warpgroup_mma_wait(1, deps=(acc,))
        _copy_step(
            step + STAGES - 1, steps, ring, codes, qweight, rest_weight, box, n, C, KERNEL, STAGES, BLOCK_N, REST_N, BLOCK_K
        )  # fmt: skip
    return finished(acc, rest, ready, REST_N, STAGES)


@gluon.jit
def _column_offsets(bias_ptr, has_bias, addend_ptr, has_addend, first, N, COLUMNS: gl.constexpr):
    """bias[n], and the image's addend[n] if there is one, of COLUMNS columns: fp32 in shared memory."""
    columns = first + gl.arange(0, COLUMNS, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    values = gl.load(bias_ptr + columns, mask=columns < has_bias * N, other=0.0).to(gl.float32)
    values += gl.load(addend_ptr + columns, mask=columns < has_addend * N, other=0.0).to(gl.float32)
    return gl.allocate_shared_memory(gl.float32, [COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [0]), values)


@gluon.jit
def _column_vectors(weight_scale_ptr, bias_ptr, has_bias, addend_ptr, has_addend, first, N, COLUMNS: gl.constexpr):
    """Weight scales and offsets."""
    scales = column_vector(weight_scale_ptr, first, N, COLUMNS)
    return scales, _column_offsets(bias_ptr, has_bias, addend_ptr, has_addend, first, N, COLUMNS)


@gluon.jit
def _zero_sums(
    zero_point, sums_ptr, first, N, box, H, W, ACC: gl.constexpr, KERNEL: gl.constexpr, BOX_W: gl.constexpr, BLOCK_M: gl.constexpr,
    COLUMNS: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """(BLOCK_M, COLUMNS) ACC: what sums begin with. Minus zero_point * border_sums[class(m), n], while the first copies are under way.

    Classes as of ../int8_conv2d.py's border_sums; one after the other, as in triton_ops/epilogue.py.
    """
    acc = gl.full([BLOCK_M, COLUMNS], 0, ACC, layout=layout)
    if sums_ptr is not None:
        _, corner_h, corner_w = box
        local = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
        h = corner_h + local // BOX_W
        w = corner_w + local % BOX_W
        top, bottom = (h < 0).to(gl.int32), (h + (KERNEL - 1) >= H).to(gl.int32)
        left, right = (w < 0).to(gl.int32), (w + (KERNEL - 1) >= W).to(gl.int32)
        border_class = 4 * top + 8 * bottom + left + 2 * right
        present = 4 * gl.max(top, 0) + 8 * gl.max(bottom, 0) + gl.max(left, 0) + 2 * gl.max(right, 0)
        columns = first + gl.arange(0, COLUMNS, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        table = sums_ptr + columns
        inside = gl.load(table, mask=columns < N, other=0)
        acc -= gl.expand_dims(gl.convert_layout(zero_point * inside, gl.SliceLayout(0, layout)), 0)
        for other_class in range(1, 16):
            if (other_class & present) == other_class:
                missing = gl.load(table + other_class * N, mask=columns < N, other=0) - inside
                missing = gl.expand_dims(gl.convert_layout(missing, gl.SliceLayout(0, layout)), 0)
                acc -= gl.expand_dims(gl.where(border_class == other_class, zero_point, 0), 1) * missing
    return acc


@gluon.jit
def _finish(
    acc, vectors, scale, place, n, y, has_residual, staged, arrived,
    first: gl.constexpr, layout: gl.constexpr, BLOCK_M: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Scale and store COLUMNS columns, which begin at `first` in the vectors and at n in y. staged holds the residual, if there is one."""
    scales, offsets = vectors
    image, h, w = place
    result = acc.to(gl.float32) * (scale * of_columns(scales, first, COLUMNS, layout)) + of_columns(offsets, first, COLUMNS, layout)
    pixels = staged.reshape([BLOCK_M, COLUMNS])
    if has_residual:
        mbarrier.wait(arrived, 0)
        result += pixels.load(layout).to(gl.float32)
    pixels.store(result.to(y.dtype))
    fence_async_shared()
    copy_out(y, [image, h, w, n], staged)


@gluon.jit
def _copy_residual(
    residual, residual_rest, has_residual, place, n, staged, staged_rest, arrived,
    PART_N: gl.constexpr, PARTS: gl.constexpr, REST_N: gl.constexpr,
):  # fmt: skip
    """Start the copies into what the results will be staged in, if there is a residual."""
    image, h, w = place
    wanted = has_residual != 0
    mbarrier.init(arrived, count=1)
    rest_bytes: gl.constexpr = residual_rest.block_type.nbytes if REST_N else 0
    mbarrier.expect(arrived, PARTS * residual.block_type.nbytes + rest_bytes, wanted)
    for part in gl.static_range(PARTS):
        copy_in(residual, [image, h, w, n + part * PART_N], arrived, staged.index(part), wanted)
    if REST_N:
        copy_in(residual_rest, [image, h, w, n + PARTS * PART_N], arrived, staged_rest, wanted)


@gluon.jit
def _staging(y, y_rest, PARTS: gl.constexpr, REST_N: gl.constexpr):
    """Shared memory for each part of the result, and a barrier for what is copied there."""
    staged = gl.allocate_shared_memory(y.dtype, [PARTS] + y.block_shape, y.layout)  # noqa: RUF005
    staged_rest = staged
    if REST_N:
        staged_rest = gl.allocate_shared_memory(y.dtype, y_rest.block_shape, y_rest.layout)
    return staged, staged_rest, gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())


@gluon.jit(do_not_specialize=RUNTIME_ONLY)
def _gluon_conv_kernel(
    codes, qweight, rest_weight, y, y_rest, residual, residual_rest, has_residual,
    scale_ptr, zero_point_ptr, weight_scale_ptr, border_sums_ptr, bias_ptr, has_bias, addend_ptr, has_addend,
    N, C, H, W, boxes_h, boxes_w, tiles_m, images_per_scale,
    KERNEL: gl.constexpr, PADDING: gl.constexpr, BOX_H: gl.constexpr, BOX_W: gl.constexpr, ACC: gl.constexpr,
    EARLY: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, REST_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """codes, y, residual: tensor descriptors of boxes of pixels, NHWC; those of the rest are None if REST_N is 0.

    residual, addend_ptr (a vector for each image) and bias_ptr are something that is never read if has_* is 0: no kernel more for what
    an epilogue adds. border_sums_ptr: (16, N), None without a zero point. EARLY: the residual is copied before the products, which
    takes shared memory of its own; else into that of the stages, after them.
    """
    PARTS: gl.constexpr = 4
    PART_N: gl.constexpr = BLOCK_N // PARTS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 32])
    half_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N // 2, 32])
    part_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, PART_N, 32])
    rest_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, REST_N if REST_N else 8, 32])
    tile_m, tile_n = tile_position(gl.program_id(0), tiles_m, gl.cdiv(N, BLOCK_N + REST_N), GROUP_M)
    n = tile_n * (BLOCK_N + REST_N)
    image = tile_m // (boxes_h * boxes_w)
    h = tile_m // boxes_w % boxes_h * BOX_H
    w = tile_m % boxes_w * BOX_W
    place = (image, h, w)
    box = (image, h - PADDING, w - PADDING)
    steps = KERNEL * KERNEL * gl.cdiv(C, BLOCK_K)
    ring = _start(steps, codes, qweight, rest_weight, box, n, C, KERNEL, STAGES, BLOCK_N, REST_N, BLOCK_K)
    if EARLY:
        staged, staged_rest, arrived = _staging(y, y_rest, PARTS, REST_N)
        _copy_residual(residual, residual_rest, has_residual, place, n, staged, staged_rest, arrived, PART_N, PARTS, REST_N)
    addend_ptr += image * N
    vectors = _column_vectors(weight_scale_ptr, bias_ptr, has_bias, addend_ptr, has_addend, n, N, BLOCK_N)
    rest_vectors = vectors
    if REST_N:
        rest_vectors = _column_vectors(weight_scale_ptr, bias_ptr, has_bias, addend_ptr, has_addend, n + BLOCK_N, N, REST_N)
    entry = image // images_per_scale
    scale = gl.load(scale_ptr + entry)
    zero_point = 0
    if border_sums_ptr is not None:
        zero_point = gl.load(zero_point_ptr + entry)
    acc = _zero_sums(zero_point, border_sums_ptr, n, N, box, H, W, ACC, KERNEL, BOX_W, BLOCK_M, BLOCK_N, layout)
    rest = acc
    if REST_N:
        rest = _zero_sums(zero_point, border_sums_ptr, n + BLOCK_N, N, box, H, W, ACC, KERNEL, BOX_W, BLOCK_M, REST_N, rest_layout)
    acc, rest = _sums(
        acc, rest, steps, ring, codes, qweight, rest_weight, box, n, C, KERNEL, STAGES, BLOCK_M, BLOCK_N, REST_N, BLOCK_K
    )  # fmt: skip
    if not EARLY:
        staged, staged_rest, arrived = _staging(y, y_rest, PARTS, REST_N)
        _copy_residual(residual, residual_rest, has_residual, place, n, staged, staged_rest, arrived, PART_N, PARTS, REST_N)
    left, right = halves(acc, BLOCK_M, BLOCK_N, half_layout)
    parts = halves(left, BLOCK_M, BLOCK_N // 2, part_layout) + halves(right, BLOCK_M, BLOCK_N // 2, part_layout)
    for part in gl.static_range(PARTS):
        _finish(
            parts[part], vectors, scale, place, n + part * PART_N, y, has_residual,
            staged.index(part), arrived, part * PART_N, part_layout, BLOCK_M, PART_N,
        )  # fmt: skip
    if REST_N:
        _finish(
            rest, rest_vectors, scale, place, n + BLOCK_N, y_rest, has_residual, staged_rest, arrived, 0, rest_layout, BLOCK_M, REST_N
        )  # fmt: skip
    wait_for_copies_out(0)
    staged._keep_alive()
    staged_rest._keep_alive()
