"""Symmetric 8-bit weights, int8 or fp8 (e4m3), one scale per output channel. 4-bit weights are not here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import WeightError

FP8 = torch.float8_e4m3fn
INT8_MAX = 127
LARGEST_CODE = {torch.int8: INT8_MAX, FP8: 448}
# fp16's smallest normal number / 127: a channel of zeros gets this scale and codes of 0.
SMALLEST_SCALE = 2.0**-14 / INT8_MAX


@dataclass(frozen=True)
class QuantizedWeight:
    """codes: int8 or e4m3 (N, K), or (Cout, kh, kw, Cin) of a conv (K contiguous). scale: fp32 (N,)."""

    codes: Tensor
    scale: Tensor


def check_weight(weight: Tensor, layer: str) -> None:
    """Raise WeightError naming the layer if the weight holds NaN or infinity."""
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise WeightError(
            f"{layer}: {bad} of {weight.numel()} weights are NaN or infinite. "
            "The file or the LoRA merged into it is damaged; download it again or lower the LoRA's strength."
        )


def quantize_weight(weight: Tensor, layer: str, dtype: torch.dtype = torch.int8) -> QuantizedWeight:
    """Quantize a weight symmetrically, one scale per output channel.

    scale[n] = max|weight[n]| / 127, codes = round(weight / scale), ties to even, in [-127, 127].
    fp8: 448 for 127, and the nearest e4m3 number.
    Args:
        weight: (N, K) or (Cout, Cin, kh, kw), any float dtype; left unchanged.
        layer: name for error messages. dtype: of the codes, int8 or float8_e4m3fn.
    Raises: WeightError if the weight is not finite or has neither 2 nor 4 dimensions.
    """
    if weight.ndim not in (2, 4):
        raise WeightError(f"{layer}: weight of shape {tuple(weight.shape)}; a Linear or Conv2d has 2 or 4 dimensions.")
    check_weight(weight, layer)
    rows = weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight
    rows = rows.float()
    largest = LARGEST_CODE[dtype]
    scale = (rows.flatten(1).abs().amax(1) / largest).clamp_min(SMALLEST_SCALE)
    ratio = rows / scale.view(-1, *[1] * (rows.ndim - 1))
    codes = (ratio.round() if dtype is torch.int8 else ratio).clamp(-largest, largest)
    return QuantizedWeight(codes.to(dtype).contiguous(), scale)


def dequantize_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype, channel_order: Tensor | None = None) -> Tensor:
    """Inverse of quantize_weight: (N, K), or (Cout, Cin, kh, kw) contiguous, in `dtype`.

    Args:
        channel_order: (K,) of codes whose input channels are in another order (channel_group.py); the result is in the model's.
    """
    if channel_order is not None:
        codes = codes[..., channel_order.long().argsort()]
    weight = (codes.float() * scale.view(-1, *[1] * (codes.ndim - 1))).to(dtype)
    return weight.permute(0, 3, 1, 2).contiguous() if codes.ndim == 4 else weight
