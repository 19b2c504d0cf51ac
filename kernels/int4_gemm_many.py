"""Several Linears with 4-bit weights of one activation (q, k, v), whose weights lie apart. Checks and reference; kernel in triton_ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import QuantizedActivation
from .int4_gemm import check_int4_gemm, dequantized_int4_gemm, int4_gemm_ref
from .int8_gemm_many import MAX_WEIGHTS


class Int4LinearWeight(NamedTuple):
    """One layer, as int4_gemm takes it: qweight (N, ceil(K / 128) * 64) uint8, group_scale (ceil(K / 128), N) int32, weight_scale
    (N,) fp32, weight_sum (N,) int32 or None, bias (N,) or None."""

    qweight: Tensor
    group_scale: Tensor
    weight_scale: Tensor
    weight_sum: Tensor | None = None
    bias: Tensor | None = None


def checked_int4_weights(activation: QuantizedActivation, weights: Sequence[Sequence[Tensor | None]]) -> list[Int4LinearWeight]:
    """The weights, named. Raises: LayoutError unless there are 1 to 3 of equal shape, and all or none have a bias."""
    layers = [Int4LinearWeight(*weight) for weight in weights]
    shapes = {tuple(layer.qweight.shape) for layer in layers}
    if not 1 <= len(layers) <= MAX_WEIGHTS or len(shapes) != 1 or len({layer.bias is None for layer in layers}) != 1:
        raise LayoutError(
            f"int4_gemm_many: {len(layers)} weights of shapes {sorted(shapes)}; 1 to {MAX_WEIGHTS} of one shape, with a bias each or none, "
            "are needed. Call int4_gemm for each."
        )
    for layer in layers:
        check_int4_gemm(activation, *layer)
    return layers


def int4_gemm_many_ref(
    activation: QuantizedActivation, weights: Sequence[Sequence[Tensor | None]], out_dtype: torch.dtype = torch.float16
) -> list[Tensor]:
    """int4_gemm_ref of every weight.

    Args:
        activation: codes (M, K). weights: 1 to 3 Int4LinearWeights, or tuples of their fields, of equal shape.
    Returns: a tensor (M, N) of out_dtype for every weight. The kernel's are views of one (M, 3N) tensor, as int8_gemm_many's.
    Raises: LayoutError if the shapes do not fit.
    """
    return [int4_gemm_ref(activation, *layer, out_dtype) for layer in checked_int4_weights(activation, weights)]


def dequantized_int4_gemm_many(
    activation: QuantizedActivation, weights: Sequence[Sequence[Tensor | None]], out_dtype: torch.dtype = torch.float16
) -> list[Tensor]:
    """int4_gemm_many_ref's result up to the rounding of `out_dtype`, without integer products; same arguments, same errors."""
    return [dequantized_int4_gemm(activation, *layer, out_dtype) for layer in checked_int4_weights(activation, weights)]
