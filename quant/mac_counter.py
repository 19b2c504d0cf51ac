"""Counts multiply-adds by how they really ran. Never-quantized layers do not report here."""

from __future__ import annotations

from collections import defaultdict


class MacCounter:
    """A host attaches one for a run; each layer that may be quantized records every call."""

    def __init__(self) -> None:
        self.total_by_layer: dict[str, int] = defaultdict(int)
        self.integer_by_layer: dict[str, int] = defaultdict(int)

    def record(self, layer: str, macs: int, integer: bool) -> None:
        """macs: multiply-adds of one call. integer: both operands were codes, integers or fp8, in the product itself."""
        self.total_by_layer[layer] += macs
        if integer:
            self.integer_by_layer[layer] += macs

    @property
    def total(self) -> int:
        return sum(self.total_by_layer.values())

    def integer_share(self) -> float:
        """Share in [0, 1] of the recorded multiply-adds that ran as integers; 0 if none were recorded."""
        return sum(self.integer_by_layer.values()) / self.total if self.total else 0.0
