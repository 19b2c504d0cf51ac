"""int4_gemm of rows that stay floats (W4A16): a kernel for a few rows, which only reads the weight; cuBLAS for more.

A few rows (the embeddings' layers) are bound by the weight's bytes, of which packed ones have a quarter. Many rows are bound by
16-bit tensor cores, for which cuBLAS is best: the weight is written out once, to a scratch tensor. Unpacking it for every tile
took 2 to 3 times as long as cuBLAS with a 16-bit weight on an H200.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ..activation import QuantizedActivation
from ..finish import Finish
from ..int4_weight import CHANNELS_PER_BLOCK, GROUP_SIZE
from ..repeat import empty, launch
from .int4_expand import dequantized
from .int8_gemm import optional_bias
from .launch import cdiv, on_device

RUNTIME_ONLY = ["M", "has_bias"]
# Rows of x up to which the kernel below takes less time than writing out the weight and cuBLAS.
MOST_ROWS = 4
# A program's blocks of 128 channels: a few rows of the weight with all their channels, so that no load waits for another.
BLOCKS, MOST_BLOCKS, WARPS = 64, 64, 4


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _int4_few_rows_kernel(
    x_ptr, qweight_ptr, group_scale_ptr, y_ptr, weight_scale_ptr, bias_ptr, has_bias, M, N, K, stride_xm, stride_wn,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """ROWS columns of y, one row of x after the other; BLOCKS * 2 * GROUP is at least K."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block, ks = tl.arange(0, BLOCKS), tl.arange(0, GROUP)
    inside_n = rows < N
    inside = inside_n[:, None] & (block * 2 * GROUP < K)[None, :]
    packed_ptrs = qweight_ptr + rows[:, None, None] * stride_wn + block[None, :, None] * GROUP + ks[None, None, :]
    packed = tl.load(packed_ptrs, mask=inside[:, :, None], other=0)
    words = tl.load(group_scale_ptr + block[None, :] * N + rows[:, None], mask=inside, other=0)
    low = ((packed & 15).to(tl.float32) - 8.0) * ((words << 16) >> 16).to(tl.float32)[:, :, None]
    high = ((packed >> 4).to(tl.float32) - 8.0) * (words >> 16).to(tl.float32)[:, :, None]
    weight_scale = tl.load(weight_scale_ptr + rows, mask=inside_n, other=0.0)
    bias = tl.load(bias_ptr + rows, mask=rows < has_bias * N, other=0.0).to(tl.float32)
    channels = block[None, :, None] * 2 * GROUP + ks[None, None, :]
    for m in tl.range(0, M):
        x_ptrs = x_ptr + m * stride_xm + channels
        x_low = tl.load(x_ptrs, mask=channels < K, other=0.0).to(tl.float32)
        x_high = tl.load(x_ptrs + GROUP, mask=channels + GROUP < K, other=0.0).to(tl.float32)
        sums = tl.sum((low * x_low + high * x_high).reshape(ROWS, BLOCKS * GROUP), axis=1)
        tl.store(y_ptr + m * N + rows, (sums * weight_scale + bias).to(y_ptr.dtype.element_ty), mask=inside_n)


def int4_float_rows(
    x: Tensor,
    qweight: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    finish: Finish,
) -> Tensor | QuantizedActivation:
    """int4_gemm of x (M, K) float, on operands that have been checked.

    Up to MOST_ROWS rows products and sums are fp32, with nothing rounded. Else the weight is rounded to x's dtype, in which cuBLAS
    multiplies; so it is with an addend or codes to be stored, which SDXL's layers of this kind do not have.
    """
    if x.shape[0] <= MOST_ROWS and finish.is_plain and cdiv(x.shape[1], CHANNELS_PER_BLOCK) <= MOST_BLOCKS:
        return _few_rows(x, qweight, group_scale, weight_scale, bias, out_dtype)
    weight = dequantized(qweight, group_scale, weight_scale, x.shape[1], x.dtype)
    y = functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return y.to(out_dtype) if finish.is_plain else finish.apply(y.float(), out_dtype)


def _few_rows(x: Tensor, qweight: Tensor, group_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    (M, K), N = x.shape, qweight.shape[0]
    y, blocks = empty((M, N), out_dtype, x.device), triton.next_power_of_2(cdiv(K, CHANNELS_PER_BLOCK))
    rows = max(1, BLOCKS // blocks)
    with on_device(y):
        launch(
            _int4_few_rows_kernel, (cdiv(N, rows),),
            x, qweight, group_scale, y, weight_scale, *optional_bias(bias, y), M, N, K, x.stride(0), qweight.stride(0),
            ROWS=rows, BLOCKS=blocks, GROUP=GROUP_SIZE, num_warps=WARPS,
        )  # fmt: skip
    return y
