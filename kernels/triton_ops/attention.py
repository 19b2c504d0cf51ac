"""Triton kernels of attention: all of a prompt's keys at once, or tokens' keys with a running maximum. Formula: ../attention.py.

Either writes the next Linear's codes, which saves a launch that reads the result again; and cuDNN clears a counter before each call.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..attention import OPERATION, check_attention
from ..repeat import empty, launch
from ..static_scale import StaticScale
from .clipping import add_clipped, count_beyond_and_nan
from .encoding import reciprocal, static_entry
from .launch import cdiv, compute_capability, on_device
from .packed_codes import pack_codes, shifted_ratio
from .rounding import INTERPRETED
from .row_parts import split_row
from .scale_entries import scale_entries

LOG2_E = math.log2(math.e)
BLOCK_M = 64
BLOCK_N = 64
NUM_STAGES = 3
NUM_WARPS = 4
HEAD_WIDTHS = (32, 64, 128)
LEAST_KEYS = 16  # the matrix units' step
MOST_KEYS = 160  # of a row of logits in registers, without spills
# With 77 keys five programs fit on a multiprocessor of sm_90 by this many registers each, and four by the 105 that they would take.
FEW_KEYS, FEW_REGISTERS = 80, 96
# Against cuDNN and the quantizer on an H100: 35.7 us to 38.8 at 1024 tokens of 20 heads, 59.6 to 64.4 at 2048 of 10, 201 to 197 at 4096.
MOST_TOKENS = 2048
MEASURED_SM = (0, 90)  # 0: the interpreter
# Sizes whose value or divisibility must not make another compiled kernel: a prompt has 77 keys, or 154.
RUNTIME_ONLY = ["T", "S"]


def is_faster(q: Tensor, k: Tensor, heads: int) -> bool:
    """Whether a kernel takes q (B, T, h d) and k (B, S, h d), and is not slower than torch's attention."""
    if q.dtype is not k.dtype or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[2] not in [heads * d for d in HEAD_WIDTHS]:
        return False
    T, S = q.shape[1], k.shape[1]
    if 0 < S <= MOST_KEYS:
        return T > 0
    in_blocks = T > 0 and T % BLOCK_M == S % BLOCK_N == 0
    return in_blocks and S <= MOST_TOKENS and q.shape[2] == 64 * heads and compute_capability(q.device) in MEASURED_SM


@triton.jit
def _keys(ptr, first, S, stride, LENGTH: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr):
    """(LENGTH, D) keys or values from `first` on, 0 beyond S. EVEN: there is none."""
    keys = first + tl.arange(0, LENGTH)[:, None]
    ptrs = ptr + keys * stride + tl.arange(0, D)[None, :]
    return tl.load(ptrs) if EVEN else tl.load(ptrs, mask=keys < S, other=0.0)


@triton.jit
def _logits(q, k, first, S, LENGTH: tl.constexpr, EVEN: tl.constexpr):
    """(BLOCK_M, LENGTH) products of q with keys, -inf beyond S."""
    if INTERPRETED:  # which takes bfloat16's bits for whole numbers
        q, k = q.to(tl.float32), k.to(tl.float32)
    logits = tl.dot(q, k.T)
    return logits if EVEN else tl.where((first + tl.arange(0, LENGTH) < S)[None, :], logits, float("-inf"))


@triton.jit
def _weighted(p, v, acc):
    """acc + the sum of the values (LENGTH, D), each times its p (BLOCK_M, LENGTH)."""
    p = p.to(v.dtype)
    if INTERPRETED:
        p, v = p.to(tl.float32), v.to(tl.float32)
    return tl.dot(p, v, acc)


@triton.jit
def _first_program():
    """Whether this one is the first of its sample."""
    return (tl.program_id(0) == 0) & (tl.program_id(1) == 0)


@triton.jit
def _stored_scale(
    sample, samples_per_scale, scale_ptr, zero_point_ptr, table_ptr, zero_table_ptr, bucket_ptr,
    STATIC: tl.constexpr, HAS_ZERO_POINT: tl.constexpr,
):  # fmt: skip
    """This sample's scale and zero point; 1 and 0 unless STATIC."""
    if STATIC:
        begins = _first_program() & (sample % samples_per_scale == 0)
        entry = sample // samples_per_scale
        return static_entry(table_ptr, zero_table_ptr, bucket_ptr, scale_ptr, zero_point_ptr, entry, entry >= 0, begins, HAS_ZERO_POINT)
    else:
        return 1.0, 0


@triton.jit
def _store(
    y, share, y_ptr, rows, sample, T, scale, zero_point, clipped_ptr,
    STATIC: tl.constexpr, HAS_ZERO_POINT: tl.constexpr, EVEN_T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Store y * share (BLOCK_M, D) of one head, as floats or codes. rows: (BLOCK_M, 1). EVEN_T: none is outside."""
    width = tl.num_programs(1) * D
    y_ptrs = y_ptr + (sample * T * width + tl.program_id(1) * D) + (rows * width + tl.arange(0, D)[None, :])
    if STATIC:
        ratio = y * (share * reciprocal(scale))
        if clipped_ptr is not None:
            clipped, ratio = count_beyond_and_nan(ratio, rows < T, zero_point, HAS_ZERO_POINT)
            add_clipped(clipped_ptr, clipped, T * tl.num_programs(2), _first_program() & (sample == 0))
        elif HAS_ZERO_POINT:
            ratio = tl.where(ratio == ratio, ratio, 0.0)
        y = pack_codes(shifted_ratio(ratio, zero_point, HAS_ZERO_POINT), tl.int8)
    else:
        y = (y * share).to(y_ptr.dtype.element_ty)
    if EVEN_T:
        tl.store(y_ptrs, y)
    else:
        tl.store(y_ptrs, y, mask=rows < T)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _prompt_attention_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, scale_ptr, zero_point_ptr, table_ptr, zero_table_ptr, bucket_ptr, clipped_ptr,
    T, S, factor, samples_per_scale, stride_qb, stride_qt, stride_kb, stride_ks,
    STATIC: tl.constexpr, HAS_ZERO_POINT: tl.constexpr, EVEN_T: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, EVEN_HEAD: tl.constexpr,
):  # fmt: skip
    """Some queries of one head. HEAD, TAIL: row_parts.py's of the keys; EVEN_HEAD: there are HEAD at least. factor: for exp2."""
    sample = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * D
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    q = _keys(q_ptr + sample * stride_qb + head, tl.program_id(0) * BLOCK_M, T, stride_qt, BLOCK_M, D, EVEN_T)
    k_ptr += sample * stride_kb + head
    v_ptr += sample * stride_kb + head
    k = _keys(k_ptr, 0, S, stride_ks, HEAD, D, EVEN_HEAD)
    more_k = _keys(k_ptr, HEAD, S, stride_ks, TAIL, D, False)
    # Two loads, one after the other: beside those of q and k.
    scale, zero_point = _stored_scale(
        sample, samples_per_scale, scale_ptr, zero_point_ptr, table_ptr, zero_table_ptr, bucket_ptr, STATIC, HAS_ZERO_POINT
    )
    logits = _logits(q, k, 0, S, HEAD, EVEN_HEAD)
    more = _logits(q, more_k, HEAD, S, TAIL, False)
    v = _keys(v_ptr, 0, S, stride_ks, HEAD, D, EVEN_HEAD)
    more_v = _keys(v_ptr, HEAD, S, stride_ks, TAIL, D, False)
    top = tl.maximum(tl.max(logits, axis=1), tl.max(more, axis=1))[:, None] * factor
    logits = tl.exp2(logits * factor - top)
    more = tl.exp2(more * factor - top)
    share = 1.0 / (tl.sum(logits, axis=1) + tl.sum(more, axis=1))[:, None]
    y = _weighted(more, more_v, _weighted(logits, v, tl.zeros((BLOCK_M, D), tl.float32)))
    _store(y, share, y_ptr, rows, sample, T, scale, zero_point, clipped_ptr, STATIC, HAS_ZERO_POINT, EVEN_T, D)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _token_attention_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, scale_ptr, zero_point_ptr, table_ptr, zero_table_ptr, bucket_ptr, clipped_ptr,
    T, S, factor, samples_per_scale, stride_qb, stride_qt, stride_kb, stride_ks,
    STATIC: tl.constexpr, HAS_ZERO_POINT: tl.constexpr, EVEN_T: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some queries of one head. S is a multiple of BLOCK_N. factor: of the logits, for exp2."""
    sample = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * D
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    q = _keys(q_ptr + sample * stride_qb + head, tl.program_id(0) * BLOCK_M, T, stride_qt, BLOCK_M, D, EVEN_T)
    scale, zero_point = _stored_scale(
        sample, samples_per_scale, scale_ptr, zero_point_ptr, table_ptr, zero_table_ptr, bucket_ptr, STATIC, HAS_ZERO_POINT
    )
    offsets = sample * stride_kb + head + tl.arange(0, BLOCK_N)[:, None] * stride_ks + tl.arange(0, D)[None, :]
    k_ptrs, v_ptrs = k_ptr + offsets, v_ptr + offsets
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    y = tl.zeros((BLOCK_M, D), tl.float32)
    for _ in tl.range(0, S, BLOCK_N, num_stages=STAGES):
        logits = _logits(q, tl.load(k_ptrs), 0, S, BLOCK_N, True)
        higher = tl.maximum(top, tl.max(logits, axis=1) * factor)
        p = tl.exp2(logits * factor - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, axis=1)
        y = _weighted(p, tl.load(v_ptrs), y * shrink[:, None])
        top = higher
        k_ptrs += BLOCK_N * stride_ks
        v_ptrs += BLOCK_N * stride_ks
    share = (1.0 / total)[:, None]
    _store(y, share, y_ptr, rows, sample, T, scale, zero_point, clipped_ptr, STATIC, HAS_ZERO_POINT, EVEN_T, D)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, static: StaticScale | None = None) -> Tensor | QuantizedActivation:
    """See attention_ref; the map is rounded to q's dtype, as other attention kernels do. For what is_faster says yes to."""
    check_attention(q, k, v, heads, static)
    q = q if q.stride(2) == 1 else q.contiguous()
    if k.stride() != v.stride() or k.stride(2) != 1:  # one step for both: a second one costs the loop an addition per load
        k, v = k.contiguous(), v.contiguous()
    B, T, width = q.shape
    S, d = k.shape[1], width // heads
    entries = scale_entries(OPERATION, static, B * T, B, T, q.device)
    y = empty((B, T, width), q.dtype, q.device) if static is None else empty((B * T, width), torch.int8, q.device)
    kernel, sizes = _kernel_for(S, static is not None and d <= 64 and compute_capability(q.device) == 90)
    with on_device(q):
        launch(
            kernel, (cdiv(T, BLOCK_M), heads, B),
            q, k, v, y, entries.scale, entries.zero_point_or_scale, *entries.tables, entries.clipped,
            T, S, LOG2_E / math.sqrt(d), entries.rows_per_scale // T, *q.stride()[:2], *k.stride()[:2],
            STATIC=static is not None, HAS_ZERO_POINT=entries.zero_point is not None, EVEN_T=T % BLOCK_M == 0, D=d, BLOCK_M=BLOCK_M,
            **sizes, num_warps=NUM_WARPS,
        )  # fmt: skip
    return y if static is None else QuantizedActivation(y, entries.scale, entries.zero_point, entries.rows_per_scale)


def _kernel_for(keys: int, limits_registers: bool) -> tuple[object, dict[str, object]]:
    """The kernel for so many keys, and its own constants and options."""
    if keys > MOST_KEYS:
        return _token_attention_kernel, {"BLOCK_N": BLOCK_N, "STAGES": NUM_STAGES}
    head, tail = split_row(max(keys, 2 * LEAST_KEYS))
    options = {"maxnreg": FEW_REGISTERS} if limits_registers and head + tail <= FEW_KEYS else {}
    return _prompt_attention_kernel, {"HEAD": head, "TAIL": max(tail, LEAST_KEYS), "EVEN_HEAD": head <= keys, **options}
