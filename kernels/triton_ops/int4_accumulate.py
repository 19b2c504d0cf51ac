"""Device functions that sum products of packed weights and int8 codes over K. Nibbles: int4_unpack.py.

The product is computed as y^T = W x^T: as the first operand, unpacked weights go from registers into the tensor cores,
without a way back through shared memory (93 instructions a step instead of 171 on sm_8x with Triton 3.6).
"""

import triton
import triton.language as tl

from .int4_unpack import unpack


@triton.jit
def int4_sums_from_pointers(
    x_ptr, w_ptr, group_scale_ptr, weight_rows, inside_n, first_m, M, N, K, stride_xm, stride_wn,
    ASM: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_M) sums over K of the weight's rows `weight_rows` from w_ptr on, and of rows of x from first_m on.

    Args: weight_rows: (BLOCK_N,) int32. N: group scales of a block of 128 channels, so rows of the whole weight.
        EVEN_K: K is a multiple of 2 * GROUP.
    """
    ks = tl.arange(0, GROUP)
    local_m = tl.arange(0, BLOCK_M)
    inside_m = local_m < M - first_m
    x_ptrs = x_ptr + first_m * stride_xm + local_m[None, :] * stride_xm + ks[:, None]
    w_ptrs = w_ptr + weight_rows[:, None] * stride_wn + ks[None, :]
    word_ptrs = group_scale_ptr + weight_rows
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for k in tl.range(0, K, 2 * GROUP):
        packed = tl.load(w_ptrs, mask=inside_n[:, None], other=0)
        low = tl.load(x_ptrs, mask=inside_m[None, :], other=0)
        high = tl.load(x_ptrs + GROUP, mask=inside_m[None, :] if EVEN_K else inside_m[None, :] & (ks[:, None] < K - k - GROUP), other=0)
        words = tl.load(word_ptrs, mask=inside_n, other=0)
        acc = tl.dot(unpack(packed, words, False, ASM), low, acc, out_dtype=tl.int32)
        acc = tl.dot(unpack(packed, words, True, ASM), high, acc, out_dtype=tl.int32)
        word_ptrs += N
        x_ptrs += 2 * GROUP
        w_ptrs += GROUP
    return acc


@triton.jit
def int4_sums_from_descriptors(
    x, qweight, group_scale_ptr, first_m, first_n, N, K,
    ASM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As int4_sums_from_pointers, of the weight's rows from first_n on. Beyond the edges of x and qweight zeros are read."""
    local_n = tl.arange(0, BLOCK_N)
    inside_n = local_n < N - first_n
    word_ptrs = group_scale_ptr + first_n + local_n
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for k in tl.range(0, K, 2 * GROUP):
        packed = qweight.load([first_n, k // 2])
        low = x.load([first_m, k]).T
        high = x.load([first_m, k + GROUP]).T
        words = tl.load(word_ptrs, mask=inside_n, other=0)
        acc = tl.dot(unpack(packed, words, False, ASM), low, acc, out_dtype=tl.int32)
        acc = tl.dot(unpack(packed, words, True, ASM), high, acc, out_dtype=tl.int32)
        word_ptrs += N
    return acc
