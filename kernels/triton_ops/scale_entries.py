"""What a producer's launcher passes for its scales, stored or computed, and what its kernel fills in. No kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..repeat import empty
from ..static_scale import StaticScale


@dataclass(frozen=True)
class ScaleEntries:
    """scale, zero_point: (S,), filled in by the kernel. tables: scale, zero point and bucket pointers, placeholders if dynamic.

    clipped: the counters of StaticScale, or None.
    """

    scale: Tensor
    zero_point: Tensor | None
    rows_per_scale: int
    tables: tuple[Tensor, Tensor, Tensor]
    clipped: Tensor | None = None

    @property
    def zero_point_or_scale(self) -> Tensor:
        """A pointer for kernels that do not read it without a zero point."""
        return self.scale if self.zero_point is None else self.zero_point


def scale_entries(
    operation: str,
    static: StaticScale | None,
    rows: int,
    units: int,
    dynamic_rows_per_scale: int,
    device: torch.device,
    dynamic_zero_point: bool = False,
) -> ScaleEntries:
    """The entries of `static` (samples in whole `units`), or empty ones of dynamic_rows_per_scale rows each."""
    rows_per_scale = dynamic_rows_per_scale if static is None else static.rows_per_scale(operation, rows, units)
    entries = rows // rows_per_scale
    scale = empty((entries,), torch.float32, device)
    if static is None:
        zero_point = empty((entries,), torch.int32, device) if dynamic_zero_point else None
        return ScaleEntries(scale, zero_point, rows_per_scale, (scale, scale, scale))
    has_zero_point = static.zero_point is not None
    zero_point = empty((entries,), torch.int32, device) if has_zero_point else None
    tables = (static.scale, static.zero_point if has_zero_point else static.scale, static.bucket)
    return ScaleEntries(scale, zero_point, rows_per_scale, tables, static.clipped)
