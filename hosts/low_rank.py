"""A low-rank branch beside a quantized layer: y + up(down(x)). Its factors are a file's (quant/low_rank.py) or a LoRA's (comfy/lora.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class LowRankBranch:
    """A layer's own, or all its low-rank patches side by side: their ranks are concatenated, their strengths folded into `up`.

    down: (R, K), up: (N, R); for a conv (R, Cin, kh, kw) and (Cout, R, 1, 1).
    """

    down: Tensor
    up: Tensor

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    def linear(self, x: Tensor) -> Tensor:
        """What a Linear's branch adds: (..., K) -> (..., N)."""
        branch = self.on(x.device, x.dtype)
        return functional.linear(functional.linear(x, branch.down), branch.up)

    def scaled(self, multiplied: Callable[[Tensor], Tensor]) -> LowRankBranch:
        """With factors on the layer's output. multiplied: (R, N) -> the same with the factors of its last dimension."""
        return LowRankBranch(self.down, multiplied(self.up.t()).t())

    def on(self, device: torch.device, dtype: torch.dtype) -> LowRankBranch:
        """The branch on a device; itself if it is there already, which is the usual case."""
        if self.down.device == device and self.down.dtype == dtype:
            return self
        return LowRankBranch(self.down.to(device, dtype), self.up.to(device, dtype))
