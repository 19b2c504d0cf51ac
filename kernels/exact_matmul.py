"""int8 x int8 -> int32 in plain torch, exact, and its scaling: what every reference multiplies with."""

from __future__ import annotations

import torch
from torch import Tensor

# |sum over 1024 products of int8 codes| <= 1024 * 128 * 128 = 2^24: fp32 holds every partial sum, in whatever order.
EXACT_FP32_TERMS = 1024
# Rows that a CPU multiplies and scales at a time: temporaries of a few MiB stay in its cache, and 4 times faster to scale.
CPU_ROWS_PER_BLOCK = 512
# torch._int_mm on CUDA: more than 16 rows, other sides multiples of 8.
INT_MM_MIN_ROWS = 17
INT_MM_MULTIPLE = 8


def matmul_int8(codes: Tensor, qweight: Tensor) -> Tensor:
    """codes @ qweight.T with exact int32 sums.

    CUDA: torch._int_mm. Elsewhere fp32 matmuls over at most 1024 terms, exact on integers of this size, added as
    int32: without VNNI torch._int_mm measured 25 times slower on a CPU (AVX2, torch 2.13).
    Args:
        codes: (M, K) int8. qweight: (N, K) int8. K <= 65536, or the int32 sums may wrap.
    Returns: (M, N) int32.
    """
    return _int_mm_padded(codes, qweight) if codes.is_cuda else _Fp32Product(qweight, codes.shape[0])(codes)


def _int_mm_padded(codes: Tensor, qweight: Tensor) -> Tensor:
    (M, K), N = codes.shape, qweight.shape[0]
    pad_m, pad_n, pad_k = max(INT_MM_MIN_ROWS - M, 0), -N % INT_MM_MULTIPLE, -K % INT_MM_MULTIPLE
    if pad_m or pad_k:
        codes = torch.nn.functional.pad(codes, (0, pad_k, 0, pad_m))
    if pad_n or pad_k:
        qweight = torch.nn.functional.pad(qweight, (0, pad_k, 0, pad_n))
    acc = torch._int_mm(codes.contiguous(), qweight.contiguous().t())
    return acc[:M, :N].contiguous() if pad_m or pad_n else acc


class _Fp32Product:
    """codes @ qweight.T for blocks of rows, one after the other, in buffers that all blocks share.

    Fresh memory for every block would cost a CPU more than the product: each page of it has to be cleared first.
    """

    def __init__(self, qweight: Tensor, rows: int) -> None:
        """qweight: (N, K) int8. rows: the most that a block has."""
        N, K = qweight.shape
        self._chunks = [
            (slice(k, k + EXACT_FP32_TERMS), qweight[:, k : k + EXACT_FP32_TERMS].float().t()) for k in range(0, K, EXACT_FP32_TERMS)
        ]
        self._codes = torch.empty(rows, min(K, EXACT_FP32_TERMS), device=qweight.device)
        self._part = torch.empty(rows, N, device=qweight.device)
        self._acc, self._addend = torch.empty(2, rows, N, dtype=torch.int32, device=qweight.device)

    def __call__(self, codes: Tensor) -> Tensor:
        """(M, K) int8 -> (M, N) int32, valid until the next call."""
        M = codes.shape[0]
        part, acc, addend = self._part[:M], self._acc[:M], self._addend[:M]
        # Autocast would turn these matmuls into bf16 ones, whose results are rounded.
        with torch.autocast(codes.device.type, enabled=False):
            for number, (terms, weight) in enumerate(self._chunks):
                floats = self._codes[:M, : weight.shape[0]].copy_(codes[:, terms])
                torch.mm(floats, weight, out=part)
                if number == 0:
                    acc.copy_(part)
                else:
                    acc += addend.copy_(part)
        return acc


def scaled_matmul_int8(
    codes: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    weight_scale: Tensor,
    row_zero_point: Tensor | None,
    halo: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """Write row_scale[m] * weight_scale[n] * (acc[m, n] - row_zero_point[m] * halo[m, n]) + bias[n] into y.

    acc is matmul_int8's; the subtraction is int32, the scaling fp32.
    Args:
        codes: (M, K) int8. qweight: (N, K) int8. row_scale: (M,) fp32. weight_scale: (N,) fp32.
        row_zero_point: (M,) int32 with halo: (M, N) or (1, N) int32; both None if symmetric.
        bias: (N,) fp32 or None. y: (M, N) any float dtype, is overwritten.
    """
    M = codes.shape[0]
    step = max(M, 1) if codes.is_cuda else min(max(M, 1), CPU_ROWS_PER_BLOCK)
    multiply = (lambda block: _int_mm_padded(block, qweight)) if codes.is_cuda else _Fp32Product(qweight, step)
    for m in range(0, M, step):
        rows = slice(m, min(m + step, M))
        acc = multiply(codes[rows])
        if row_zero_point is not None:
            acc -= row_zero_point[rows, None] * (halo if halo.shape[0] == 1 else halo[rows])
        product = acc * (row_scale[rows, None] * weight_scale)
        if bias is not None:
            product += bias
        y[rows] = product
