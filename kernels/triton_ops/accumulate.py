"""Device functions that sum products over K, from pointers (cp.async) or tensor descriptors (TMA, sm_90 and newer)."""

import triton
import triton.language as tl


@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of an output tile: column by column within groups of GROUP_M rows of tiles, so that L2 is reused."""
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first_m + within % group_m, within // group_m


@triton.jit
def chosen(which, first, second, third):
    """One of three pointers."""
    pointer = first
    if which == 1:
        pointer = second
    if which == 2:
        pointer = third
    return pointer


@triton.jit
def gemm_from_pointers(
    a_ptr, w_ptr, local_m, local_n, inside_m, inside_n, K, k_first, k_last, stride_am, stride_wn,
    ACC: tl.constexpr, EVEN_K: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) sums over [k_first, k_last); a_ptr and w_ptr are the corners of the tile's rows and columns."""
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + local_m[:, None] * stride_am + (k_first + ks)[None, :]
    w_ptrs = w_ptr + local_n[None, :] * stride_wn + (k_first + ks)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for k in tl.range(k_first, k_last, BLOCK_K, loop_unroll_factor=UNROLL):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=inside_m[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=inside_n[None, :], other=0.0)
        else:
            a = tl.load(a_ptrs, mask=inside_m[:, None] & (ks[None, :] < K - k), other=0.0)
            w = tl.load(w_ptrs, mask=inside_n[None, :] & (ks[:, None] < K - k), other=0.0)
        acc = tl.dot(a, w, acc, out_dtype=ACC)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return acc


@triton.jit
def gemm_from_descriptors(
    codes, qweight, first_m, first_n, w_offset, k_first, k_last,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As gemm_from_pointers; the weight's K starts w_offset later. Beyond the codes' edges zeros are read."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    return add_from_descriptors(acc, codes, qweight, first_m, first_n, w_offset, k_first, k_last, ACC, BLOCK_K)


@triton.jit
def add_from_descriptors(acc, codes, qweight, first_m, first_n, w_offset, k_first, k_last, ACC: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc and the sums of gemm_from_descriptors."""
    for k in tl.range(k_first, k_last, BLOCK_K):
        a = codes.load([first_m, k])
        w = qweight.load([first_n, w_offset + k])
        acc = tl.dot(a, w.T, acc, out_dtype=ACC)
    return acc


@triton.jit
def conv_from_pointers(
    a_ptr, w_ptr, pixels, h, w, inside_m, inside_n, W, H, C, stride_tap, first, last,
    KERNEL: tl.constexpr, ACC: tl.constexpr, EVEN_C: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums over steps [first, last) of BLOCK_K channels, KERNEL * KERNEL taps of cdiv(C, BLOCK_K) steps each.

    Args: a_ptr: the codes. pixels: (BLOCK_M,) int64, the pixel under the first tap, whose row and column are h and w (both
        may lie in the padding). w_ptr: (1, BLOCK_N), each output channel's weights; taps are stride_tap apart.
    """
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + pixels[:, None] * C + ks[None, :]
    w_ptrs = w_ptr + ks[:, None]
    steps = tl.cdiv(C, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    # One flat loop, so that loads are pipelined across taps too.
    for step in tl.range(first, last, loop_unroll_factor=UNROLL):
        tap = step // steps
        c = (step - tap * steps) * BLOCK_K
        tap_h = tap // KERNEL
        tap_w = tap - tap_h * KERNEL
        # Taps in the padding read code 0; what the zero point makes of that is put right in the epilogue.
        mask_a = (inside_m & (h + tap_h >= 0) & (h + tap_h < H) & (w + tap_w >= 0) & (w + tap_w < W))[:, None]
        mask_w = inside_n[None, :]
        if not EVEN_C:
            mask_a = mask_a & (ks[None, :] < C - c)
            mask_w = mask_w & (ks[:, None] < C - c)
        a = tl.load(a_ptrs + ((tap_h * W + tap_w) * C + c), mask=mask_a, other=0.0)
        b = tl.load(w_ptrs + (tap * stride_tap + c), mask=mask_w, other=0.0)
        acc = tl.dot(a, b, acc, out_dtype=ACC)
    return acc


@triton.jit
def conv_from_descriptors(
    codes, qweight, rest_weight, image, h, w, first_n, C, w_offset, stride_tap, first, last,
    KERNEL: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As conv_from_pointers for stride 1: each tap is the same box of pixels, shifted; outside the image zeros are read.

    Returns: a tuple of (BLOCK_M, BLOCK_N) sums and, if there are any, those of the next REST_N columns, by rest_weight.
    """
    steps = tl.cdiv(C, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if REST_N:
        rest = tl.zeros((BLOCK_M, REST_N), ACC)
    for step in tl.range(first, last):
        tap = step // steps
        c = (step - tap * steps) * BLOCK_K
        tap_h = tap // KERNEL
        a = codes.load([image, h + tap_h, w + (tap - tap_h * KERNEL), c]).reshape(BLOCK_M, BLOCK_K)
        b = qweight.load([first_n, w_offset + tap * stride_tap + c])
        acc = tl.dot(a, b.T, acc, out_dtype=ACC)
        if REST_N:
            b_rest = rest_weight.load([first_n + BLOCK_N, w_offset + tap * stride_tap + c])
            rest = tl.dot(a, b_rest.T, rest, out_dtype=ACC)
    sums = (acc,)
    if REST_N:
        sums = (acc, rest)
    return sums
