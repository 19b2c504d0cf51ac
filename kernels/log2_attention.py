"""Attention on int8 queries and keys: with DGQ's log2-quantized map, or with a float one. Formulas and references; kernels in triton_ops.

Fidelity at low bits is what log2 maps are for, not speed: matrix units have no shift-add, so 2^-q is multiplied as fp16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LayoutError
from .quantize_token import INT8_MAX, TINY

LOG2_E = math.log2(math.e)
# Rows of a map that the reference holds at a time.
ROWS_PER_BLOCK = 1024


@dataclass(frozen=True)
class AttentionOperands:
    """Quantized inputs of B * h heads.

    q: int8 (B * h, Tq, d), k: int8 (B * h, T, d), q_scale: fp32 (B * h, Tq) with the softmax scale and log2(e) in it, k_scale: fp32
    (B * h, T). v: int8 codes (B * h, T, d) with v_scale fp32 (B * h, d), or floats with v_scale None. v_start: (B * h, T, d), the
    values of start tokens, which v leaves out, and 0 elsewhere; None without start tokens. heads: h.
    """

    q: Tensor
    k: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor | None
    v_start: Tensor | None
    heads: int


def attention_operands(
    q: Tensor, k: Tensor, v: Tensor, quantize_value: bool, smooth_keys: bool = False, start: Tensor | None = None
) -> AttentionOperands:
    """Quantize Q and K per token, V per head and column if asked for.

    Args:
        q: (B, h, Tq, d). k, v: (B, h, T, d), any float dtype and strides; left unchanged.
        smooth_keys: subtract the keys' mean over tokens first, which moves every logit of a query alike and leaves the map as it is.
        start: (B, T) bool, tokens whose values stay float: they would take the column's scale for themselves. Or None.
    Raises: LayoutError if the shapes do not fit.
    Source: DGQ quantizes Q, K and V to 8 bits; token scales of Q and K as in SageAttention (arXiv 2410.02367), section 3.2, and its
        smoothing of K. Differs from DGQ: its K keeps token 0 float, here every token has a scale of its own; its V quantizes token 0
        with the others, which on a start token 80 times larger leaves the others two bits.
    """
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise LayoutError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; (B, h, Tq, d) and twice (B, h, T, d) are needed. "
            "Split heads first."
        )
    B, h, _, d = q.shape
    if start is not None and (start.shape != (B, k.shape[2]) or start.dtype is not torch.bool):
        raise LayoutError(
            f"log2_attention: start is {start.dtype} {tuple(start.shape)}; a bool {(B, k.shape[2])} is needed. Use start_tokens."
        )
    if smooth_keys:
        k = k.float() - k.float().mean(2, keepdim=True)
    (q_codes, q_scale), (k_codes, k_scale) = _per_row(q), _per_row(k)
    value, v_scale, v_start = v.reshape(B * h, -1, d).contiguous(), None, None
    if start is not None:
        kept = start.repeat_interleave(h, 0)[..., None]
        value, v_start = value.masked_fill(kept, 0), value.masked_fill(~kept, 0)
    if quantize_value:
        v_scale = value.float().abs().amax(1).clamp_min(TINY) / INT8_MAX
        value = (value.float() / v_scale[:, None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return AttentionOperands(q_codes, k_codes, q_scale * (LOG2_E / math.sqrt(d)), k_scale, value, v_scale, v_start, h)


def _per_row(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.reshape(-1, *x.shape[2:]).float()
    scale = x.abs().amax(-1).clamp_min(TINY) / INT8_MAX
    return (x / scale[..., None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8).contiguous(), scale


def log2_attention_ref(q: Tensor, k: Tensor, v: Tensor, bits: int, start: Tensor | None = None) -> Tensor:
    """Attention whose map is quantized to log2 codes with a scale of its own for every sample (prompt).

    P = softmax(q_scale k_scale (Q K^T)), integers in the product; s[b] = largest P of sample b but for start columns;
    code = clamp(round(-log2(P / s)), 0, 2^bits - 1), ties to even; P' = s 2^-code, in start columns P itself;
    y = P' V, V in int8 but for start tokens.
    Args:
        q: (B, h, Tq, d). k, v: (B, h, T, d), any float dtype; left unchanged.
        bits: 4 to 8. start: (B, T) bool, tokens that are kept apart, or None.
    Returns: (B, h, Tq, d) in q's dtype.
    Raises: LayoutError if the shapes do not fit.
    Source: DGQ (arXiv 2501.04304), section 4.2. Differs from the official code: the scale is each sample's own maximum, not that of
        the whole batch, so that a prompt's picture does not depend on what it is batched with; start tokens are found by value.
    """
    operands = attention_operands(q, k, v, quantize_value=True, start=start)
    y = torch.empty(operands.q.shape[0], q.shape[2], v.shape[3], device=q.device)
    for sample in range(q.shape[0]):
        heads = range(sample * operands.heads, (sample + 1) * operands.heads)
        kept = None if start is None else start[sample]
        scale = torch.stack([_loose(_map(operands, head, rows), kept).amax() for head in heads for rows in _blocks(q.shape[2])]).amax()
        for head in heads:
            value = operands.v[head].float() * operands.v_scale[head]
            value = value if kept is None else value + operands.v_start[head]
            for rows in _blocks(q.shape[2]):
                p = _map(operands, head, rows)
                codes = (-(p / scale).log2()).round().clamp(0, 2**bits - 1)
                quantized = scale * torch.exp2(-codes)
                y[head, rows] = (quantized if kept is None else torch.where(kept, p, quantized)) @ value
    return y.view(q.shape[0], q.shape[1], *y.shape[1:]).to(q.dtype)


def int8_attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with an int8 product of Q and K, smoothed keys, and a float map and V.

    Args: as for log2_attention_ref. Returns: (B, h, Tq, d) in q's dtype.
    Source: SageAttention (arXiv 2410.02367), equations 1 to 4, with scales per token.
    """
    operands = attention_operands(q, k, v, quantize_value=False, smooth_keys=True)
    y = torch.empty(operands.q.shape[0], q.shape[2], v.shape[3], device=q.device)
    for head in range(len(y)):
        for rows in _blocks(q.shape[2]):
            y[head, rows] = _map(operands, head, rows) @ operands.v[head].float()
    return y.view(q.shape[0], q.shape[1], *y.shape[1:]).to(q.dtype)


def _blocks(rows: int) -> list[slice]:
    return [slice(row, min(row + ROWS_PER_BLOCK, rows)) for row in range(0, rows, ROWS_PER_BLOCK)]


def _map(operands: AttentionOperands, head: int, rows: slice) -> Tensor:
    """(rows, T) fp32 softmax. Sums of at most 1024 int8 products are exact in fp32."""
    product = operands.q[head, rows].float() @ operands.k[head].float().t()
    logits = product * operands.q_scale[head, rows, None] * operands.k_scale[head]
    return torch.softmax(logits / LOG2_E, -1)


def _loose(p: Tensor, kept: Tensor | None) -> Tensor:
    """The columns that are quantized; a map of start tokens alone has none, and its scale does not matter."""
    return p if kept is None else p.masked_fill(kept, TINY)
