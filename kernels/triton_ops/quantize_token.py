"""Triton kernel of quantize_token: one program quantizes a few rows. Formula: ../quantize_token.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..quantize_token import TINY, check_rows
from .launch import on_device
from .rounding import dynamic_scale, magnitude, round_half_even

BLOCK_ELEMENTS = 4096
MAX_BLOCK_K = 2048


@triton.jit
def _quantize_token_kernel(
    x_ptr, codes_ptr, scale_ptr,
    M, K, stride_xm, stride_xk,
    TINY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + columns[None, :] * stride_xk
    inside_m = rows[:, None] < M

    absmax = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs + k * stride_xk, mask=inside_m & (columns[None, :] < K - k), other=0.0)
        absmax = tl.maximum(absmax, tl.max(magnitude(x), axis=1))
    scale = dynamic_scale(absmax, TINY)
    tl.store(scale_ptr + rows, scale, mask=rows < M)

    # The second reading comes from the cache: a row is a few KiB.
    codes_ptrs = codes_ptr + rows[:, None] * K + columns[None, :]
    for k in range(0, K, BLOCK_K):
        inside = inside_m & (columns[None, :] < K - k)
        x = tl.load(x_ptrs + k * stride_xk, mask=inside, other=0.0).to(tl.float32)
        codes = round_half_even(tl.div_rn(x, tl.broadcast_to(scale[:, None], (BLOCK_M, BLOCK_K))))
        tl.store(codes_ptrs + k, codes.to(tl.int8), mask=inside)


def quantize_token(x: Tensor) -> QuantizedActivation:
    """See quantize_token_ref, whose codes and scales these are, bit for bit."""
    check_rows(x, "quantize_token")
    M, K = x.shape
    codes = torch.empty((M, K), dtype=torch.int8, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    block_k = min(triton.next_power_of_2(K), MAX_BLOCK_K)
    block_m = max(1, min(BLOCK_ELEMENTS // block_k, triton.next_power_of_2(M)))
    with on_device(x):
        _quantize_token_kernel[(triton.cdiv(M, block_m),)](
            x, codes, scale, M, K, x.stride(0), x.stride(1), TINY=TINY, BLOCK_M=block_m, BLOCK_K=block_k, num_warps=4
        )
    return QuantizedActivation(codes, scale, None, 1)
