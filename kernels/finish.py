"""What may follow a product before it is stored: an addend, and int8 codes instead of floats. Checks and reference.

y'[m, n] = y[m, n] + addend[m // (M / A), n]                                   addend (A, N): a residual if A = M, or
                                                                               a vector per image (time embedding) if A = images
q[m, n] = clamp(round(y'[m, n] / out_scale[e]) + out_zero_point[e], -128, 127)  e = m // (M / S); [-127, 127] if symmetric
The kernels do both in the product's epilogue, in fp32: triton_ops/epilogue.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import QuantizedActivation


@dataclass(frozen=True)
class Finish:
    """addend: (A, N) any float dtype, or None. out_scale: (S,) fp32 > 0, out_zero_point: (S,) int32, or None."""

    addend: Tensor | None = None
    out_scale: Tensor | None = None
    out_zero_point: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the product is stored as it is."""
        return self.addend is None and self.out_scale is None

    def rows_per(self, entries: Tensor | None, M: int) -> int:
        """How many rows share an entry; 1 if there are none."""
        return 1 if entries is None else M // max(entries.shape[0], 1)

    def check(self, operation: str, M: int, N: int) -> None:
        """Raise LayoutError unless these fit an (M, N) product."""
        a, s = self.addend, self.out_scale
        if a is not None and (a.ndim != 2 or a.shape[1] != N or not a.is_contiguous() or a.shape[0] == 0 or M % a.shape[0]):
            raise LayoutError(
                f"{operation}: addend of shape {tuple(a.shape)}, strides {a.stride()}; contiguous ({M}, {N}), or ({N},) per image, is "
                "needed. Pass a contiguous residual, channels_last for images, or one vector per image."
            )
        if s is None and self.out_zero_point is not None:
            raise LayoutError(f"{operation}: out_zero_point without out_scale; codes need a scale. Pass both or none.")
        for name, vector in (("out_scale", s), ("out_zero_point", self.out_zero_point)):
            if vector is not None and (vector.ndim != 1 or vector.shape != s.shape or M % max(vector.numel(), 1)):
                raise LayoutError(
                    f"{operation}: {name} of shape {tuple(vector.shape)} for {M} rows; (S,) with S a divisor of the rows is needed. "
                    "Pass one entry per sample, or one for all."
                )

    def apply(self, y: Tensor, out_dtype: torch.dtype) -> Tensor | QuantizedActivation:
        """The reference: y (M, N) fp32, overwritten -> (M, N) out_dtype, or codes."""
        M = y.shape[0]
        if self.addend is not None:
            y.view(self.addend.shape[0], -1, y.shape[1]).add_(self.addend.float()[:, None])
        if self.out_scale is None:
            return y.to(out_dtype)
        codes = y.view(self.out_scale.numel(), -1) / self.out_scale[:, None]
        codes = codes.nan_to_num_(nan=0.0).round_()
        if self.out_zero_point is None:
            codes.clamp_(-127, 127)
        else:
            codes.add_(self.out_zero_point[:, None]).clamp_(-128, 127)
        return self.activation(codes.to(torch.int8).view(y.shape), M)

    def activation(self, codes: Tensor, M: int) -> QuantizedActivation:
        """The codes with the scales they were made with."""
        return QuantizedActivation(codes, self.out_scale, self.out_zero_point, self.rows_per(self.out_scale, M))


def image_addend(operation: str, addend: Tensor | None, B: int, N: int, Ho: int, Wo: int) -> Tensor | None:
    """(B, N) per image, or (B, N, Ho, Wo) channels_last as a residual -> the (A, N) of Finish."""
    if addend is None or addend.ndim == 2:
        return addend
    if addend.shape != (B, N, Ho, Wo) or not addend.is_contiguous(memory_format=torch.channels_last):
        raise LayoutError(
            f"{operation}: addend of shape {tuple(addend.shape)}, strides {addend.stride()}; ({B}, {N}, {Ho}, {Wo}) channels_last, or "
            f"({B}, {N}), is needed. Use .contiguous(memory_format=torch.channels_last)."
        )
    return addend.permute(0, 2, 3, 1).reshape(-1, N)


def as_images(result: Tensor | QuantizedActivation, B: int, Ho: int, Wo: int) -> Tensor | QuantizedActivation:
    """Rows (B * Ho * Wo, N) -> (B, N, Ho, Wo) with channels_last strides; codes stay NHWC."""
    if isinstance(result, QuantizedActivation):
        codes = result.codes.view(B, Ho, Wo, -1)
        return QuantizedActivation(codes, result.scale, result.zero_point, result.rows_per_scale)
    return result.view(B, Ho, Wo, -1).permute(0, 3, 1, 2)
