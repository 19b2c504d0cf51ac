"""Dynamic quantization with one symmetric scale per token (row). Formula and reference; kernel in triton_ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import LARGEST_CODE, QuantizedActivation

INT8_MAX = LARGEST_CODE[torch.int8]
# Floor of absmax: a row of zeros gets codes of 0 and a scale far from fp32's subnormals, which GPUs flush.
TINY = 2.0**-100


def dynamic_scale(absmax: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """fp32 absmax -> fp32 scale: max(absmax, TINY) / 127, of fp8 codes / 448; NaN where absmax is NaN or infinite."""
    # A tensor, not a number: by a number CUDA multiplies with the reciprocal, which rounds otherwise.
    scale = absmax.clamp_min(TINY) / torch.full_like(absmax, LARGEST_CODE[dtype])
    return torch.where(torch.isfinite(absmax), scale, torch.nan)


def symmetric_codes(ratio: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 x / scale, which is overwritten -> codes: the nearest within [-127, 127], or [-448, 448] of fp8; ties to even, NaN becomes 0."""
    ratio.nan_to_num_(nan=0.0)
    if dtype is torch.int8:
        ratio.round_()
    return ratio.clamp_(-LARGEST_CODE[dtype], LARGEST_CODE[dtype]).to(dtype)  # clamped first: beyond 464 e4m3 is NaN


def check_rows(x: Tensor, operation: str) -> None:
    """Raise LayoutError unless x is a (M, K) float tensor."""
    if x.ndim != 2 or not x.is_floating_point():
        raise LayoutError(f"{operation}: x is {x.dtype} {tuple(x.shape)}; a float (M, K) is needed. Flatten the leading dimensions first.")


def check_into(x: Tensor, dtype: torch.dtype, into: QuantizedActivation | None) -> None:
    """Raise LayoutError unless `into` can take the codes and scales of x (M, K)."""
    if into is None:
        return
    found = (into.codes.dtype, into.codes.shape, into.codes.is_contiguous(), into.scale.shape, into.zero_point)
    if found != (dtype, x.shape, True, x.shape[:1], None):
        raise LayoutError(
            f"quantize_token: into has {into.codes.dtype} {tuple(into.codes.shape)} and {into.scale.numel()} scales; contiguous {dtype} "
            f"{tuple(x.shape)}, a scale per row and no zero point are needed. Pass the same rows of a tensor made for all."
        )


def quantize_token_ref(x: Tensor, dtype: torch.dtype = torch.int8, into: QuantizedActivation | None = None) -> QuantizedActivation:
    """Quantize every row of x with its own symmetric scale.

    scale[m] = max(absmax(x[m]), 2^-100) / 127; q = clamp(round(x / scale[m]), -127, 127), ties to even.
    fp8: 448 for 127, and rounded to the nearest e4m3 number.
    A row with a NaN or an infinity gets scale NaN and codes 0: what is computed from it is NaN, as without quantization.
    Args:
        x: (M, K) any float dtype, any strides; left unchanged. dtype: of the codes, int8 or float8_e4m3fn.
        into: where codes and scales are written, contiguous; None for new memory.
    Returns: codes (M, K), scale (M,), no zero point, rows_per_scale 1: `into` itself if given.
    Raises: LayoutError if x is not a float (M, K), or `into` has other shapes.
    Source: LLM.int8 (arXiv 2208.07339), section 2.1, vector-wise absmax.
    """
    check_rows(x, "quantize_token")
    check_into(x, dtype, into)
    x = x.float()
    scale = dynamic_scale(x.abs().amax(1), dtype)
    codes = symmetric_codes(x / scale[:, None], dtype)
    if into is None:
        return QuantizedActivation(codes, scale, None, 1)
    into.codes.copy_(codes)
    into.scale.copy_(scale)
    return into
