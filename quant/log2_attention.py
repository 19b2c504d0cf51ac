"""DGQ's attention: how maps are quantized, and which tokens are kept apart. The product is in kernels/log2_attention.py."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ..errors import SchemeError

CHUNK = 77  # tokens per CLIP chunk; longer prompts are chunks side by side, each with a start token of its own
# SDXL's start token has an absmax of about 800 among tokens of about 10 (MixDQ, arXiv 2405.17873, section 4.1).
START_RATIO = 8.0
MIN_BITS, MAX_BITS = 4, 8  # of DGQ's tables; 4 bits hold 2^-15, beyond what a softmax needs


class AttentionMode(str, Enum):
    """FLOAT: the engine's own. INT8_QK: int8 product of Q and K, float map (fast). LOG2: DGQ's map, for low bits, not for speed."""

    FLOAT = "float"
    INT8_QK = "int8_qk"
    LOG2 = "log2"


@dataclass(frozen=True)
class AttentionScheme:
    """bits: of a log2 map's codes. keep_start: start tokens of cross-attention stay float in the map.

    Raises: SchemeError if bits are not 4 to 8.
    """

    mode: AttentionMode = AttentionMode.FLOAT
    bits: int = 8
    keep_start: bool = True

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise SchemeError(f"attention: {self.bits} bits; {MIN_BITS} to {MAX_BITS} are known for log2 maps. Choose one of those.")

    def to_json(self) -> dict[str, object]:
        return {"mode": self.mode.value, "bits": self.bits, "keep_start": self.keep_start}


def attention_schemes(data: object, source: str) -> dict[str, AttentionScheme]:
    """A recipe's attention layers from JSON. Raises SchemeError naming the layer if a part is unknown."""
    if not isinstance(data, dict):
        raise SchemeError(f"{source}: the recipe's attention layers are damaged. Quantize the model again.")
    schemes = {}
    for layer, fields in data.items():
        try:
            schemes[layer] = AttentionScheme(AttentionMode(fields["mode"]), int(fields["bits"]), bool(fields["keep_start"]))
        except (KeyError, TypeError, ValueError) as error:
            raise SchemeError(
                f"{layer}: unknown attention scheme {fields!r} ({error}). Update StepQuant, or quantize the model again."
            ) from None
    return schemes


def start_tokens(tokens: Tensor) -> Tensor | None:
    """Which tokens are start tokens, found by value: in each chunk the one that towers over the others.

    Args: tokens: (B, T, C) text context, or keys, any float dtype.
    Returns: (B, T) bool; None if T is no whole number of chunks, as in self-attention. No host sync.
    """
    B, T, _ = tokens.shape
    if T == 0 or T % CHUNK:
        return None
    size = tokens.abs().amax(-1).float().view(B, T // CHUNK, CHUNK)
    return (size > START_RATIO * size.median(-1, keepdim=True).values).view(B, T)


def log2_quantized(p: Tensor, scale: Tensor, bits: int) -> Tensor:
    """p as its codes hold it: scale * 2^-q, q = clamp(round(-log2(p / scale)), 0, 2^bits - 1), ties to even.

    Args: p: attention probabilities in [0, 1]. scale: broadcastable, > 0, the largest p that is quantized.
    Source: DGQ (arXiv 2501.04304), section 4.2, log2 quantizer with the prompt-specific scale.
    """
    return scale * torch.exp2(-(-(p / scale).log2()).round().clamp(0, 2**bits - 1))
