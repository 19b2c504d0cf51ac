"""CLIP's tokenizers from the shipped list of merges; the vocabulary is derived from it. No network, no other files."""

from __future__ import annotations

import lzma
from functools import lru_cache

from transformers import CLIPTokenizer

from .architecture import MODEL_DIR

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
VOCAB_SIZE = 49408
MAX_TOKENS = 77


@lru_cache(maxsize=1)
def read_merges() -> tuple[tuple[str, str], ...]:
    """The 48,894 byte-pair merges of OpenAI's CLIP vocabulary, best first."""
    text = lzma.decompress((MODEL_DIR / "merges.txt.xz").read_bytes()).decode("utf-8")
    return tuple(tuple(line.split(" ")) for line in text.splitlines())


def build_vocabulary() -> dict[str, int]:
    """Token -> id: 256 byte characters, the same with `</w>`, the merges, then the two marks."""
    characters = _byte_characters()
    tokens = characters + [c + "</w>" for c in characters] + ["".join(pair) for pair in read_merges()]
    return {token: index for index, token in enumerate([*tokens, BOS, EOS])}


def build_tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Tokenizers of encoder L (pads with the end mark) and encoder G (pads with id 0, the character `!`)."""
    vocabulary, merges = build_vocabulary(), list(read_merges())
    return tuple(CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=MAX_TOKENS) for pad in (EOS, "!"))


def _byte_characters() -> list[str]:
    # CLIP orders bytes as GPT-2's byte-to-unicode table does: printable ones first, as themselves; the rest
    # follow as characters from 256 up, because a BPE token may hold no space or control character.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(rest))]
