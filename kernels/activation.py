"""Quantized activations: codes with their scales. How they are made is in the quantize_* files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LayoutError

FP8 = torch.float8_e4m3fn
LARGEST_CODE = {torch.int8: 127, FP8: 448}  # of symmetric codes
CODE_DTYPES = tuple(LARGEST_CODE)


@dataclass(frozen=True)
class QuantizedActivation:
    """x ≈ (codes - zero_point) * scale; row m uses entry m // rows_per_scale.

    codes: int8 or fp8 e4m3, (M, K), or NHWC (B, H, W, C) whose rows are its pixels in order: m = (b * H + h) * W + w.
    scale: fp32 (S,), units of x per code. zero_point: int32 (S,), the code of x = 0, or None if symmetric.
    rows_per_scale: M / S. 1 is per token, H * W per image, M one entry for all.
    Raises: LayoutError if these do not fit together.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    rows_per_scale: int

    def __post_init__(self) -> None:
        if self.codes.dtype not in CODE_DTYPES or self.codes.ndim not in (2, 4):
            raise LayoutError(
                f"activation codes: {self.codes.dtype} {tuple(self.codes.shape)}; int8 or float8_e4m3fn (M, K) or (B, H, W, C) is needed. "
                "Make them with one of the quantize operations."
            )
        if self.scale.numel() * self.rows_per_scale != self.rows:
            raise LayoutError(
                f"activation scale: {self.scale.numel()} entries of {self.rows_per_scale} rows for {self.rows} rows; "
                "entries * rows_per_scale must be the number of rows. Pass one entry per rows_per_scale rows."
            )

    @property
    def operands(self) -> tuple:
        """See repeat.py."""
        return self.codes, self.scale, self.zero_point, self.rows_per_scale

    @property
    def rows(self) -> int:
        """Number of rows M: tokens, or pixels of all images."""
        return self.codes.numel() // self.codes.shape[-1] if self.codes.shape[-1] else 0

    def per_row(self, entries: Tensor) -> Tensor:
        """(S,) -> (M,): the entry of every row."""
        return entries if self.rows_per_scale == 1 else entries.repeat_interleave(self.rows_per_scale)

    def as_rows(self) -> QuantizedActivation:
        """The same activation with codes (M, K): NHWC pixels as rows, as a 1x1 convolution's GEMM takes them."""
        if self.codes.ndim == 2:
            return self
        return QuantizedActivation(self.codes.reshape(-1, self.codes.shape[-1]), self.scale, self.zero_point, self.rows_per_scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """x as the codes hold it, in the shape of the codes, computed in fp32."""
        x = self.codes.float().reshape(self.scale.numel(), self.rows_per_scale, -1)
        if self.zero_point is not None:
            x = x - self.zero_point.view(-1, 1, 1)
        x = x * self.scale.view(-1, 1, 1)
        return x.view(self.codes.shape).to(dtype)
