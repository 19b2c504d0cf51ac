"""Triton kernels of quantize_token: a row stays in registers, is read once and written once. Formula: ../quantize_token.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..quantize_token import TINY, check_into, check_rows
from ..repeat import empty, launch
from .encoding import reciprocal
from .launch import on_device
from .packed_codes import absmax_of_tiles, divided, pack_codes
from .rounding import dynamic_scale, magnitude, nearest_code
from .row_tiles import load_tiles, rows_of_program, split_tiles, store_tile, warps_of_program

# Longer rows do not fit in registers.
MAX_HELD = 8192
BLOCK_K = 2048


@triton.jit
def _quantize_token_kernel(
    x_ptr, codes_ptr, scale_ptr,
    K, stride_xm,
    TINY: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    CODES: tl.constexpr = codes_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    x = load_tiles(x_ptr + rows * stride_xm, K, TILES, WIDTH, EVEN)
    scale = dynamic_scale(absmax_of_tiles(x), TINY, CODES)
    tl.store(scale_ptr + rows, scale)
    inverse = reciprocal(scale)
    for i in tl.static_range(TILES):
        codes = pack_codes(divided(x[i].to(tl.float32), scale, inverse), CODES)
        store_tile(codes_ptr + rows * K, K, codes, i, WIDTH, EVEN)


@triton.jit
def _quantize_long_token_kernel(x_ptr, codes_ptr, scale_ptr, K, stride_xm, TINY: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    absmax = 0.0
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row * stride_xm + k + columns, mask=columns < K - k, other=0.0)
        absmax = tl.maximum(absmax, tl.max(magnitude(x), axis=0))
    scale = dynamic_scale(absmax, TINY, codes_ptr.dtype.element_ty)
    tl.store(scale_ptr + row, scale)
    # The second reading comes from the cache: a row is a few dozen KiB.
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row * stride_xm + k + columns, mask=columns < K - k, other=0.0).to(tl.float32)
        codes = nearest_code(tl.div_rn(x, tl.full((BLOCK_K,), scale, tl.float32)), codes_ptr.dtype.element_ty)
        tl.store(codes_ptr + row * K + k + columns, codes.to(codes_ptr.dtype.element_ty), mask=columns < K - k)


def quantize_token(x: Tensor, dtype: torch.dtype = torch.int8, into: QuantizedActivation | None = None) -> QuantizedActivation:
    """See quantize_token_ref, whose codes and scales these are, bit for bit."""
    check_rows(x, "quantize_token")
    check_into(x, dtype, into)
    x = x if x.stride(1) == 1 else x.contiguous()
    M, K = x.shape
    codes = empty((M, K), dtype, x.device) if into is None else into.codes
    scale = empty((M,), torch.float32, x.device) if into is None else into.scale
    with on_device(x):
        if K <= MAX_HELD:
            tiles, width = split_tiles(K)
            block_m = rows_of_program(M, width)
            launch(
                _quantize_token_kernel, (M // block_m,),
                x, codes, scale, K, x.stride(0), TINY=TINY, BLOCK_M=block_m, TILES=tiles, WIDTH=width, EVEN=tiles * width == K,
                num_warps=warps_of_program(block_m, width),
            )  # fmt: skip
        else:
            launch(_quantize_long_token_kernel, (M,), x, codes, scale, K, x.stride(0), TINY=TINY, BLOCK_K=BLOCK_K, num_warps=4)
    return QuantizedActivation(codes, scale, None, 1)
