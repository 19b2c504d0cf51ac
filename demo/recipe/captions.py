"""Captions to token ids, over the small vocabulary that captions use; the whole CLIP vocabulary stays out of the training."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tokenizer import MAX_TOKENS, VOCAB_SIZE, build_tokenizers
from .data import Banks, read_subjects
from .scenes import BACKGROUNDS, NUMBER_WORDS, STYLES, plural, with_article

# Encoder G pads with the character `!` inside a word, which no caption holds.
PAD_ID_G = 0


class CaptionVocabulary:
    """The token ids that captions can hold, and the way from CLIP's ids to rows of a compact token table.

    `used_ids` (rows,) int64 ascending; `eos_row`, `pad_row_g` index it.
    """

    def __init__(self, banks: Banks):
        self._tokenizer = build_tokenizers()[0]
        texts = [with_article(name) for name in read_subjects()] + [plural(name) for name in read_subjects()]
        texts += [avatar.caption for avatar in banks.avatar_rows]
        texts += [*STYLES.values(), *BACKGROUNDS, *NUMBER_WORDS.values()]
        texts += ["a of, background", "next to", "to the left of", "and above", "an"]
        found = {token for ids in self._tokenizer(texts).input_ids for token in ids}
        self.used_ids = torch.tensor(sorted(found | {PAD_ID_G}))
        self._rows = torch.full((VOCAB_SIZE,), -1)
        self._rows[self.used_ids] = torch.arange(len(self.used_ids))
        self.eos_row = int(self._rows[self._tokenizer.eos_token_id])
        self.pad_row_g = int(self._rows[PAD_ID_G])

    def __len__(self) -> int:
        return len(self.used_ids)

    def rows(self, captions: list[str]) -> Tensor:
        """(B, 77) int16 rows of the compact table, padded as encoder L pads.

        Raises: ValueError if a caption holds a token outside the vocabulary.
        """
        ids = self._tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True).input_ids
        rows = self._rows[torch.tensor(ids)]
        if rows.min() < 0:
            missing = captions[int(rows.min(1).values.argmin())]
            raise ValueError(f"{missing!r}: a token outside the caption vocabulary; needed words of the prompt grammar.")
        return rows.to(torch.int16)

    def pad_for_g(self, rows_l: Tensor) -> Tensor:
        """(B, 77) the same captions as encoder G pads them: everything after the first end mark is row `pad_row_g`."""
        ended = (rows_l == self.eos_row).cumsum(1) - (rows_l == self.eos_row).long()
        return torch.where(ended > 0, self.pad_row_g, rows_l)
