"""Stored activation scales with the timestep buckets of a batch: what a producer needs to write static codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import WIDE
from .quantize_static import BUCKETS


def check_static_codes(operation: str, static: object | None, dtype: torch.dtype, writes_wide: bool = False) -> None:
    """Raise LayoutError if stored scales are given for codes that are not int8: tables are calibrated for these. Or for wide codes,
    unless the operation writes them."""
    if dtype is WIDE and not writes_wide:
        raise LayoutError(f"{operation}: 16-bit codes, which it cannot write. Let it be done in floats, and quantize with quantize_wide.")
    if static and dtype is not torch.int8:
        raise LayoutError(f"{operation}: stored scales for {dtype} codes; they are of int8 codes. Pass none, for dynamic scales.")


@dataclass(frozen=True)
class StaticScale:
    """The consumer's tables and the batch's buckets.

    scale: (64,) fp32, > 0, units of x per code. zero_point: (64,) int32 in [-128, 127], the code of x = 0, or None.
    bucket: (S,) int64 in [0, 64), on the device of the tables; one entry per sample, or one for all.
    clipped: (2,) int32 on that device, added to: values beyond the codes' range, and rows quantized; None counts nothing.
    Raises: LayoutError if these are not so. Values are checked when a file is loaded, not here.
    """

    scale: Tensor
    zero_point: Tensor | None
    bucket: Tensor
    clipped: Tensor | None = None

    def __post_init__(self) -> None:
        for name, table in (("scale", self.scale), ("zero_point", self.zero_point)):
            if table is not None and (table.shape != (BUCKETS,) or not table.is_contiguous()):
                raise LayoutError(
                    f"static {name}: shape {tuple(table.shape)}; ({BUCKETS},) contiguous is needed. "
                    "Expand the timestep groups to one entry per bucket."
                )
        if self.bucket.ndim != 1 or self.bucket.numel() == 0 or not self.bucket.is_contiguous():
            raise LayoutError(
                f"static bucket: shape {tuple(self.bucket.shape)}; (samples,) or (1,) contiguous is needed. Pass the buckets of this batch."
            )
        if self.clipped is not None and (self.clipped.shape != (2,) or self.clipped.dtype is not torch.int32):
            raise LayoutError(f"static clipped: {self.clipped.dtype} {tuple(self.clipped.shape)}; two int32 counters are needed.")

    @property
    def operands(self) -> tuple:
        """See repeat.py."""
        return self.scale, self.zero_point, self.bucket, self.clipped

    def rows_per_scale(self, operation: str, rows: int, units: int) -> int:
        """Rows that share an entry. units: what a sample never splits, images or rows.

        Raises: LayoutError if the entries do not divide the units.
        """
        samples = self.bucket.numel()
        if units % samples:
            raise LayoutError(
                f"{operation}: {samples} buckets for {units} images or rows; a divisor of that, or one bucket for all, is needed. "
                "Pass the buckets of this batch."
            )
        return rows // samples
