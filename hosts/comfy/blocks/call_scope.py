"""What a UNet's blocks share during one call: the timestep buckets, SiLU of the embedding, the choice of attention."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from ..tap import TimestepTap
from . import attention

# Patches that are given the embedding between blocks and could change it in place.
EMBEDDING_PATCHES = {"forward_timestep_embed_patch", "middle_block_after_patch"}


class CallScope:
    """One per UNet. A block that is called outside of a UNet call finds the careful choices."""

    def __init__(self, tap: TimestepTap) -> None:
        self._tap = tap
        # Changes whenever a held weight's tensors, scales or branches do; None while weights are not held. Set by graph.py.
        self.standing: Hashable = None
        self.close()

    def open(self, prefers_cudnn: bool, transformer_options: dict) -> None:
        """A UNet call begins. prefers_cudnn: as attention.prefers_cudnn has it."""
        self._prefers_cudnn = prefers_cudnn
        self._shares_embedding = EMBEDDING_PATCHES.isdisjoint(transformer_options.get("patches", ()))

    def close(self) -> None:
        self._prefers_cudnn = self.cudnn_first = self._shares_embedding = False
        self.forget()

    @contextmanager
    def for_graph(self) -> Iterator[None]:
        """What runs in the block becomes a CUDA graph, or is run as such a one is: attention tries cuDNN first, if that is preferred.

        Not otherwise: cuDNN's attention takes less of the GPU's time and more of the processor's, which without a graph is the longer.
        """
        if not self._prefers_cudnn:
            yield
            return
        self.cudnn_first = True
        try:
            with attention.cudnn_first():
                yield
        finally:
            self.cudnn_first = False

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
