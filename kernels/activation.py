"""Quantized activations: codes with their scales. How they are made is in the quantize_* files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LayoutError

FP8 = torch.float8_e4m3fn
# Asks a producer for 16-bit codes in two int8 planes, a WideActivation. No tensor of codes has this dtype.
WIDE = torch.int16
PLANE_RATIO = 256  # of the high plane's scale to the low one's
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

    def part(self, first: int, last: int) -> QuantizedActivation:
        """Rows from first to last - 1 of codes (M, K) with a scale per row; no copy."""
        zero_point = None if self.zero_point is None else self.zero_point[first:last]
        return QuantizedActivation(self.codes[first:last], self.scale[first:last], zero_point, 1)

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


@dataclass(frozen=True)
class WideActivation:
    """x ≈ high.codes * high.scale + low.codes * low.scale: symmetric 16-bit codes in two int8 planes, high.scale = 256 * low.scale.

    A product with int8 weights is two integer products, the planes' own, whose scaled sums are added: its input is as exact as fp16.
    Both planes have the same shape and rows_per_scale, and no zero point.
    """

    high: QuantizedActivation
    low: QuantizedActivation

    @classmethod
    def split(cls, codes: Tensor, scale: Tensor, rows_per_scale: int) -> WideActivation:
        """codes: whole numbers in [-32512, 32512], any integer dtype, (M, K) or (B, H, W, C); scale: fp32 (S,), units of x per code."""
        codes = codes.int()
        high = (codes + PLANE_RATIO // 2) >> 8  # the nearest multiple, so that what is left is in [-128, 127]
        low = codes - PLANE_RATIO * high
        planes = ((high, PLANE_RATIO * scale), (low, scale))
        return cls(*(QuantizedActivation(plane.to(torch.int8), its_scale, None, rows_per_scale) for plane, its_scale in planes))

    @property
    def operands(self) -> tuple:
        """See repeat.py."""
        return self.high, self.low

    @property
    def codes(self) -> Tensor:
        """The high plane: has the shape and device of both."""
        return self.high.codes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """x as the codes hold it, in the shape of the codes, computed in fp32."""
        return (self.high.dequantize() + self.low.dequantize()).to(dtype)
