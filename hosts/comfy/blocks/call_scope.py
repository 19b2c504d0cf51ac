"""What a UNet's blocks share during one call: the timestep buckets, SiLU of the embedding, the choice of attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..tap import TimestepTap

# Patches that are given the embedding between blocks and could change it in place.
EMBEDDING_PATCHES = {"forward_timestep_embed_patch", "middle_block_after_patch"}


class CallScope:
    """One per UNet. A block that is called outside of a UNet call finds the careful choices."""

    def __init__(self, tap: TimestepTap) -> None:
        self._tap = tap
        self.close()

    def open(self, cudnn_first: bool, transformer_options: dict) -> None:
        """A UNet call begins. cudnn_first: attention.cudnn_first is in force."""
        self.cudnn_first = cudnn_first
        self._shares_embedding = EMBEDDING_PATCHES.isdisjoint(transformer_options.get("patches", ()))

    def close(self) -> None:
        self.cudnn_first = self._shares_embedding = False
        self.forget()

    def forget(self) -> None:
        """Let go of the tensors computed so far."""
        self._embedding: Tensor | None = None
        self._activated: Tensor | None = None

    def bucket(self, device: torch.device) -> Tensor:
        """(B,) int64, see TimestepTap."""
        return self._tap.bucket.to(device)

    def activated(self, embedding: Tensor) -> Tensor:
        """SiLU of the embedding, computed once for the ResBlocks of a call, which all get the same tensor."""
        if not self._shares_embedding:
            return functional.silu(embedding)
        # The tensor is held, so that no other can take its place unnoticed.
        if self._embedding is not embedding:
            self._embedding, self._activated = embedding, functional.silu(embedding)
        return self._activated
