"""Device functions that sum products over channel groups: the int32 sum is shifted at every group's end.

Groups end at multiples of BLOCK_K, so one flat loop serves all and its loads are pipelined across borders. The table of ends
holds -1 for the last group, whose sum is not shifted, so that nothing is read beyond it.
"""

import triton
import triton.language as tl


@triton.jit
def grouped_gemm_from_pointers(
    a_ptr, w_ptr, local_m, local_n, inside_m, inside_n, ends_ptr, shifts_ptr, K, stride_am, stride_wn,
    EVEN_K: tl.constexpr, UNROLL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) int32; a_ptr and w_ptr are the corners of the tile's rows and columns."""
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + local_m[:, None] * stride_am + ks[None, :]
    w_ptrs = w_ptr + local_n[None, :] * stride_wn + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    border = tl.load(ends_ptr)
    group = 0
    for k in tl.range(0, K, BLOCK_K, loop_unroll_factor=UNROLL):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=inside_m[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=inside_n[None, :], other=0.0)
        else:
            a = tl.load(a_ptrs, mask=inside_m[:, None] & (ks[None, :] < K - k), other=0.0)
            w = tl.load(w_ptrs, mask=inside_n[None, :] & (ks[:, None] < K - k), other=0.0)
        acc = tl.dot(a, w, acc, out_dtype=tl.int32)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
        if k + BLOCK_K == border:
            acc = acc << tl.load(shifts_ptr + group)
            group += 1
            border = tl.load(ends_ptr + group)
    return acc


@triton.jit
def grouped_gemm_from_descriptors(
    codes, qweight, first_m, first_n, ends_ptr, shifts_ptr, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As grouped_gemm_from_pointers. Beyond the codes' edges zeros are read."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    border = tl.load(ends_ptr)
    group = 0
    for k in tl.range(0, K, BLOCK_K):
        a = codes.load([first_m, k])
        w = qweight.load([first_n, k])
        acc = tl.dot(a, w.T, acc, out_dtype=tl.int32)
        if k + BLOCK_K == border:
            acc = acc << tl.load(shifts_ptr + group)
            group += 1
            border = tl.load(ends_ptr + group)
    return acc


@triton.jit
def grouped_conv_from_pointers(
    a_ptr, w_ptr, pixels, h, w, inside_m, inside_n, ends_ptr, shifts_ptr, W, H, C,
    KERNEL: tl.constexpr, EVEN_C: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums over all channels, all taps of BLOCK_K channels after each other. Arguments as for accumulate.conv_from_pointers."""
    TAPS: tl.constexpr = KERNEL * KERNEL
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + pixels[:, None] * C + ks[None, :]
    w_ptrs = w_ptr + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    border = tl.load(ends_ptr) // BLOCK_K * TAPS  # in steps; never reached if -1
    group = 0
    for step in tl.range(0, tl.cdiv(C, BLOCK_K) * TAPS, loop_unroll_factor=UNROLL):
        c = step // TAPS * BLOCK_K
        tap = step - step // TAPS * TAPS
        tap_h = tap // KERNEL
        tap_w = tap - tap_h * KERNEL
        # Taps in the padding read code 0; what the zero point makes of that is put right in the epilogue.
        mask_a = (inside_m & (h + tap_h >= 0) & (h + tap_h < H) & (w + tap_w >= 0) & (w + tap_w < W))[:, None]
        mask_w = inside_n[None, :]
        if not EVEN_C:
            mask_a = mask_a & (ks[None, :] < C - c)
            mask_w = mask_w & (ks[:, None] < C - c)
        a = tl.load(a_ptrs + ((tap_h * W + tap_w) * C + c), mask=mask_a, other=0.0)
        b = tl.load(w_ptrs + (tap * C + c), mask=mask_w, other=0.0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        if step + 1 == border:
            acc = acc << tl.load(shifts_ptr + group)
            group += 1
            border = tl.load(ends_ptr + group) // BLOCK_K * TAPS
    return acc


@triton.jit
def grouped_conv_from_descriptors(
    codes, qweight, image, h, w, first_n, ends_ptr, shifts_ptr, C,
    KERNEL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As grouped_conv_from_pointers for stride 1. A weight row holds all taps, so C must be a multiple of BLOCK_K: a load past
    the last channel would read the next tap's weights."""
    TAPS: tl.constexpr = KERNEL * KERNEL
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    border = tl.load(ends_ptr) // BLOCK_K * TAPS  # in steps; never reached if -1
    group = 0
    for step in tl.range(0, C // BLOCK_K * TAPS):
        c = step // TAPS * BLOCK_K
        tap = step % TAPS
        tap_h = tap // KERNEL
        a = codes.load([image, h + tap_h, w + tap % KERNEL, c]).reshape(BLOCK_M, BLOCK_K)
        b = qweight.load([first_n, tap * C + c])
        acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
        if step + 1 == border:
            acc = acc << tl.load(shifts_ptr + group)
            group += 1
            border = tl.load(ends_ptr + group) // BLOCK_K * TAPS
    return acc
