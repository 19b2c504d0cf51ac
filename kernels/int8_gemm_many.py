"""Several int8 Linear layers of one activation (q, k, v) whose weights lie apart. Checks and reference; kernel in triton_ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import QuantizedActivation
from .int8_gemm import check_gemm, int8_gemm_ref

MAX_WEIGHTS = 3


class LinearWeight(NamedTuple):
    """One layer: qweight (N, K) int8, weight_scale (N,) fp32, weight_sum (N,) int32 or None, bias (N,) or None."""

    qweight: Tensor
    weight_scale: Tensor
    weight_sum: Tensor | None = None
    bias: Tensor | None = None


def checked_weights(activation: QuantizedActivation, weights: Sequence[Sequence[Tensor | None]]) -> list[LinearWeight]:
    """The weights, named. Raises: LayoutError unless there are 1 to 3 of equal shape, and all or none have a bias."""
    layers = [LinearWeight(*weight) for weight in weights]
    shapes = {tuple(layer.qweight.shape) for layer in layers}
    if not 1 <= len(layers) <= MAX_WEIGHTS or len(shapes) != 1 or len({layer.bias is None for layer in layers}) != 1:
        raise LayoutError(
            f"int8_gemm_many: {len(layers)} weights of shapes {sorted(shapes)}; 1 to {MAX_WEIGHTS} of one shape, with a bias each or none, "
            "are needed. Call int8_gemm for each."
        )
    for layer in layers:
        check_gemm(activation, *layer)
    return layers


def int8_gemm_many_ref(
    activation: QuantizedActivation, weights: Sequence[Sequence[Tensor | None]], out_dtype: torch.dtype = torch.float16
) -> list[Tensor]:
    """int8_gemm_ref of every weight.

    Args:
        activation: codes (M, K). weights: 1 to 3 LinearWeights, or tuples of their fields, of equal shape (N, K).
    Returns: a tensor (M, N) of out_dtype for every weight. The kernel's are views of one (M, 3N) tensor: rows are contiguous
        but lie 3N apart, which .view(B, -1, heads, dim) and scaled_dot_product_attention take without a copy.
    Raises: LayoutError if the shapes do not fit.
    """
    return [int8_gemm_ref(activation, *layer, out_dtype) for layer in checked_weights(activation, weights)]
