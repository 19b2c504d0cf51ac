"""Triton kernels of log2_attention and int8_attention: flash style, no map in memory. Formulas: ../log2_attention.py.

The log2 map needs each row's sum and each sample's largest probability before a code can be written: a first pass over Q K^T
finds them. The second writes P / s = 2^-code without an exponential of its own, from the exponent's bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..log2_attention import AttentionOperands, attention_operands
from ..repeat import launch
from .launch import cdiv, on_device
from .rounding import ROUND_MAGIC, ROUND_MAGIC_BITS

BLOCK_M, BLOCK_N = 64, 64
MIN_BLOCK_D = 32  # the int8 tensor core instruction's step


@triton.jit
def _logits(q, q_scale, k_ptr, k_scale_ptr, head, first, T, d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_M, BLOCK_N) logits in units of log2, -inf beyond T."""
    columns = first + tl.arange(0, BLOCK_N)
    ds = tl.arange(0, BLOCK_D)
    inside = columns < T
    k = tl.load(k_ptr + (head * T + columns)[None, :] * d + ds[:, None], mask=inside[None, :] & (ds[:, None] < d), other=0)
    product = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32)
    scale = tl.load(k_scale_ptr + head * T + columns, mask=inside, other=0.0)
    return tl.where(inside[None, :], product * q_scale[:, None] * scale[None, :], float("-inf"))


@triton.jit
def _queries(q_ptr, q_scale_ptr, head, Tq, d, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ds = tl.arange(0, BLOCK_D)
    inside = rows < Tq
    q = tl.load(q_ptr + (head * Tq + rows)[:, None] * d + ds[None, :], mask=inside[:, None] & (ds[None, :] < d), other=0)
    return rows, inside, q, tl.load(q_scale_ptr + head * Tq + rows, mask=inside, other=0.0)


@triton.jit
def _values(v_ptr, head, first, T, d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = first + tl.arange(0, BLOCK_N)
    ds = tl.arange(0, BLOCK_D)
    return tl.load(v_ptr + (head * T + columns)[:, None] * d + ds[None, :], mask=(columns[:, None] < T) & (ds[None, :] < d), other=0.0)


@triton.jit
def _row_totals_kernel(
    q_ptr, q_scale_ptr, k_ptr, k_scale_ptr, start_ptr, total_ptr, largest_ptr,
    Tq, T, d, heads,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """total: log2 of each row's sum of 2^logit. largest: log2 of its largest probability outside start columns."""
    head = tl.program_id(1).to(tl.int64)
    rows, inside, q, q_scale = _queries(q_ptr, q_scale_ptr, head, Tq, d, BLOCK_M, BLOCK_D)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    loose_top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, T, BLOCK_N):
        logits = _logits(q, q_scale, k_ptr, k_scale_ptr, head, first, T, d, BLOCK_N, BLOCK_D)
        higher = tl.maximum(top, tl.max(logits, axis=1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(logits - higher[:, None]), axis=1)
        top = higher
        if start_ptr is not None:
            columns = first + tl.arange(0, BLOCK_N)
            kept = tl.load(start_ptr + head // heads * T + columns, mask=columns < T, other=0)
            logits = tl.where((kept != 0)[None, :], float("-inf"), logits)
        loose_top = tl.maximum(loose_top, tl.max(logits, axis=1))
    total = top + tl.log2(total)
    tl.store(total_ptr + head * Tq + rows, total, mask=inside)
    tl.store(largest_ptr + head * Tq + rows, loose_top - total, mask=inside)


@triton.jit
def _log2_attention_kernel(
    q_ptr, q_scale_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, v_start_ptr, start_ptr, total_ptr, scale_ptr, y_ptr,
    Tq, T, d, heads, last_code,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scale: log2 of each sample's largest probability, (B,)."""
    head = tl.program_id(1).to(tl.int64)
    ds = tl.arange(0, BLOCK_D)
    rows, inside, q, q_scale = _queries(q_ptr, q_scale_ptr, head, Tq, d, BLOCK_M, BLOCK_D)
    total = tl.load(total_ptr + head * Tq + rows, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + head // heads)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    exact = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, T, BLOCK_N):
        logits = _logits(q, q_scale, k_ptr, k_scale_ptr, head, first, T, d, BLOCK_N, BLOCK_D)
        columns = first + tl.arange(0, BLOCK_N)
        # -log2(P / s), from 0 to last_code; rounded ties to even like every code of this package.
        depth = tl.minimum(tl.maximum(total[:, None] + scale - logits, 0.0), last_code)
        code = (depth + ROUND_MAGIC).to(tl.int32, bitcast=True) - ROUND_MAGIC_BITS
        # 2^-code by its exponent's bits; below fp16's smallest number (2^-24) it is 0 in the product anyway.
        p = tl.where(code < 25, ((127 - code) << 23).to(tl.float32, bitcast=True), 0.0)
        p = tl.where((columns < T)[None, :], p, 0.0)
        v = _values(v_ptr, head, first, T, d, BLOCK_N, BLOCK_D).to(tl.float16)  # codes: exact
        if start_ptr is not None:
            kept = (tl.load(start_ptr + head // heads * T + columns, mask=columns < T, other=0) != 0)[None, :]
            p = tl.where(kept, 0.0, p)
            if tl.max(kept.to(tl.int32)) > 0:
                kept_p = tl.where(kept, tl.exp2(logits - total[:, None]), 0.0)
                v_start = _values(v_start_ptr, head, first, T, d, BLOCK_N, BLOCK_D).to(tl.float16)
                exact = tl.dot(kept_p.to(tl.float16), v_start, exact)
        acc = tl.dot(p.to(tl.float16), v, acc)
    v_scale = tl.load(v_scale_ptr + head * d + ds, mask=ds < d, other=0.0)
    y = acc * tl.exp2(scale) * v_scale[None, :] + exact
    mask = inside[:, None] & (ds[None, :] < d)
    tl.store(y_ptr + (head * Tq + rows)[:, None] * d + ds[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _int8_attention_kernel(
    q_ptr, q_scale_ptr, k_ptr, k_scale_ptr, v_ptr, y_ptr,
    Tq, T, d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One pass with a running maximum; the map is fp16 in its product with V."""
    head = tl.program_id(1).to(tl.int64)
    ds = tl.arange(0, BLOCK_D)
    rows, inside, q, q_scale = _queries(q_ptr, q_scale_ptr, head, Tq, d, BLOCK_M, BLOCK_D)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, T, BLOCK_N):
        logits = _logits(q, q_scale, k_ptr, k_scale_ptr, head, first, T, d, BLOCK_N, BLOCK_D)
        higher = tl.maximum(top, tl.max(logits, axis=1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(logits - higher[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        v = _values(v_ptr, head, first, T, d, BLOCK_N, BLOCK_D).to(tl.float16)
        acc = tl.dot(p.to(tl.float16), v, acc * shrink[:, None])
        top = higher
    mask = inside[:, None] & (ds[None, :] < d)
    y = acc / total[:, None]
    tl.store(y_ptr + (head * Tq + rows)[:, None] * d + ds[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def log2_attention(q: Tensor, k: Tensor, v: Tensor, bits: int, start: Tensor | None = None) -> Tensor:
    """See log2_attention_ref; probabilities within fp32's rounding of a tie may get the neighbouring code."""
    operands = attention_operands(q, k, v, quantize_value=True, start=start)
    heads, (Tq, d), T, blocks = operands.heads, operands.q.shape[1:], operands.k.shape[1], _blocks(operands)
    mask = None if start is None else start.to(torch.int8)
    total = torch.empty(operands.q.shape[:2], dtype=torch.float32, device=q.device)
    largest, y = torch.empty_like(total), torch.empty_like(operands.q, dtype=q.dtype)
    shared = (operands.q, operands.q_scale, operands.k, operands.k_scale)
    grid = (cdiv(Tq, BLOCK_M), len(total))
    with on_device(q):
        launch(_row_totals_kernel, grid, *shared, mask, total, largest, Tq, T, d, heads, **blocks)
        scale = largest.view(len(q), -1).amax(1)
        values = (operands.v, operands.v_scale, operands.v_start, mask, total, scale, y)
        # Two sums and the codes of a tile do not fit the registers of 4 warps, nor on sm_120 the wider tile of 8.
        narrow = blocks | {"num_warps": 8, "BLOCK_N": BLOCK_N if mask is None else BLOCK_N // 2}
        launch(_log2_attention_kernel, grid, *shared, *values, Tq, T, d, heads, float(2**bits - 1), **narrow)
    return y.view(q.shape)


def int8_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See int8_attention_ref; the map is rounded to fp16."""
    operands = attention_operands(q, k, v, quantize_value=False, smooth_keys=True)
    (Tq, d), T = operands.q.shape[1:], operands.k.shape[1]
    y = torch.empty_like(operands.q, dtype=q.dtype)
    with on_device(q):
        launch(
            _int8_attention_kernel, (cdiv(Tq, BLOCK_M), len(y)),
            operands.q, operands.q_scale, operands.k, operands.k_scale, operands.v, y, Tq, T, d, **_blocks(operands),
        )  # fmt: skip
    return y.view(q.shape)


def _blocks(operands: AttentionOperands) -> dict[str, int]:
    block_d = max(MIN_BLOCK_D, triton.next_power_of_2(operands.q.shape[2]))
    return {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_D": block_d, "num_warps": 4}
