"""Kernel and launcher that write packed weights out as int8 codes, or as floats, for a product that follows. Nibbles: int4_unpack.py.

The copy is a scratch tensor: it lives as long as the product, stays in a large GPU's L2 on the way, and its memory is the
allocator's again afterwards. At SDXL's sizes it is at most 13 MiB of codes (the projection before GEGLU).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..int4_expand import MOST_WEIGHTS, check_int4_expand
from ..int4_weight import GROUP_SIZE
from ..repeat import empty, launch
from .accumulate import chosen
from .int4_unpack import unpack
from .int8_gemm import k_contiguous
from .launch import cdiv, compute_capability, on_device

# A program's tile: so many rows of 64 bytes, which is 16 bytes a load and two of them a thread.
ROWS = 64
WARPS = 4
# From so many rows of x on, int8 products of a copy of the weight take less time than unpacking it for every tile: on an H200
# 1.03 to 1.2 times W8A8's at SDXL's shapes, where fused ones take 1.18 to 1.5 times as long. By sm // 10; not measured elsewhere.
LEAST_ROWS = {9: 1024}


@triton.jit
def _expand_kernel(
    qweight_1, qweight_2, qweight_3, qweight_4, qweight_5, qweight_6,
    group_scale_1, group_scale_2, group_scale_3, group_scale_4, group_scale_5, group_scale_6,
    codes_1, codes_2, codes_3, codes_4, codes_5, codes_6,
    weight_scale_ptr, N, K, stride_wn, ASM: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One block of 128 channels of ROWS rows of one weight. With a weight_scale_ptr the codes are multiplied with it."""
    block, which = tl.program_id(0), tl.program_id(2)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    ks = tl.arange(0, GROUP)
    inside = rows < N
    qweight_ptr = chosen(which, qweight_1, qweight_2, qweight_3)
    words_ptr = chosen(which, group_scale_1, group_scale_2, group_scale_3)
    codes_ptr = chosen(which, codes_1, codes_2, codes_3)
    if which > 2:
        qweight_ptr = chosen(which - 3, qweight_4, qweight_5, qweight_6)
        words_ptr = chosen(which - 3, group_scale_4, group_scale_5, group_scale_6)
        codes_ptr = chosen(which - 3, codes_4, codes_5, codes_6)
    packed = tl.load(qweight_ptr + rows[:, None] * stride_wn + block * GROUP + ks[None, :], mask=inside[:, None], other=0)
    words = tl.load(words_ptr + block * N + rows, mask=inside, other=0)
    low = unpack(packed, words, False, ASM)
    high = unpack(packed, words, True, ASM)
    if weight_scale_ptr is not None:
        scale = tl.load(weight_scale_ptr + rows, mask=inside, other=0.0)[:, None]
        low = low.to(tl.float32) * scale
        high = high.to(tl.float32) * scale
    first = block * 2 * GROUP
    ptrs = codes_ptr + rows[:, None] * K + first + ks[None, :]
    dtype: tl.constexpr = codes_1.dtype.element_ty
    tl.store(ptrs, low.to(dtype), mask=inside[:, None])
    # K is a multiple of GROUP: the last block may have no second one.
    tl.store(ptrs + GROUP, high.to(dtype), mask=inside[:, None] & (ks[None, :] < K - first - GROUP))


def int4_expand(qweights: Sequence[Tensor], group_scales: Sequence[Tensor], K: int) -> list[Tensor]:
    """See int4_expand_ref: the same codes, in one launch."""
    check_int4_expand(qweights, group_scales, K)
    qweights = [k_contiguous(qweight) for qweight in qweights]
    if len({qweight.stride(0) for qweight in qweights}) > 1:
        return [expanded([qweight], [scale], K)[0] for qweight, scale in zip(qweights, group_scales, strict=True)]
    return expanded(qweights, group_scales, K)


def expanded(qweights: Sequence[Tensor], group_scales: Sequence[Tensor], K: int) -> list[Tensor]:
    """int4_expand of weights that have been checked and whose rows are contiguous and lie equally far apart."""
    codes = [empty((qweight.shape[0], K), torch.int8, qweight.device) for qweight in qweights]
    _launch(qweights, group_scales, codes, None, K)
    return codes


def dequantized(qweight: Tensor, group_scale: Tensor, weight_scale: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) in a float dtype. weight_scale: (N,) fp32."""
    weight = empty((qweight.shape[0], K), dtype, qweight.device)
    _launch([qweight], [group_scale], [weight], weight_scale, K)
    return weight


def _launch(qweights: Sequence[Tensor], group_scales: Sequence[Tensor], out: Sequence[Tensor], weight_scale: Tensor | None, K: int) -> None:
    N, stride = out[0].shape[0], qweights[0].stride(0)
    repeated = [[*tensors, *[tensors[-1]] * (MOST_WEIGHTS - len(tensors))] for tensors in (qweights, group_scales, out)]
    with on_device(out[0]):
        launch(
            _expand_kernel, (cdiv(K, 2 * GROUP_SIZE), cdiv(N, ROWS), len(out)),
            *repeated[0], *repeated[1], *repeated[2], weight_scale, N, K, stride,
            ASM=compute_capability(out[0].device) > 0, ROWS=ROWS, GROUP=GROUP_SIZE, num_warps=WARPS,
        )  # fmt: skip


def expands(rows: int, sm: int) -> bool:
    """Whether products of so many rows use a copy of the weight, where no table says otherwise."""
    return rows >= LEAST_ROWS.get(sm // 10, rows + 1)
