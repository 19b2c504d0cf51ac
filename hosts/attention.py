"""Attention by scheme, the same in every engine. Knows tensors and kernels, not modules or overrides."""

from __future__ import annotations

from torch import Tensor

from ..kernels import dispatch
from ..quant.log2_attention import AttentionMode, AttentionScheme, start_tokens


def attend(q: Tensor, k: Tensor, v: Tensor, scheme: AttentionScheme, tokens: Tensor | None) -> Tensor:
    """Attention without a mask.

    Args:
        q: (B, h, Tq, d). k, v: (B, h, T, d), any float dtype; left unchanged.
        scheme: its mode is LOG2 or INT8_QK; FLOAT is the engine's own.
        tokens: (B, T, C), what start tokens are looked for in: the text context, or keys; None for self-attention.
    Returns: (B, h, Tq, d) in q's dtype.
    """
    if scheme.mode is AttentionMode.INT8_QK:
        return dispatch.int8_attention(q, k, v)
    start = start_tokens(tokens) if scheme.keep_start and tokens is not None else None
    return dispatch.log2_attention(q, k, v, scheme.bits, start)
