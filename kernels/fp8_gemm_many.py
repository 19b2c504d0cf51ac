"""Several fp8 Linear layers of one activation (q, k, v) whose weights lie apart. Checks and reference; kernel in triton_ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import QuantizedActivation
from .fp8_gemm import check_fp8_gemm, fp8_gemm_ref
from .int8_gemm_many import MAX_WEIGHTS, LinearWeight


def checked_fp8_weights(activation: QuantizedActivation, weights: Sequence[Sequence[Tensor | None]]) -> list[LinearWeight]:
    """The weights, named. Raises: LayoutError unless there are 1 to 3 of equal shape, and all or none have a bias."""
    layers = [LinearWeight(*weight) for weight in weights]
    shapes = {tuple(layer.qweight.shape) for layer in layers}
    if not 1 <= len(layers) <= MAX_WEIGHTS or len(shapes) != 1 or len({layer.bias is None for layer in layers}) != 1:
        raise LayoutError(
            f"fp8_gemm_many: {len(layers)} weights of shapes {sorted(shapes)}; 1 to {MAX_WEIGHTS} of one shape, with a bias each or none, "
            "are needed. Call fp8_gemm for each."
        )
    for layer in layers:
        check_fp8_gemm(activation, layer.qweight, layer.weight_scale, layer.bias, None)
    return layers


def fp8_gemm_many_ref(
    activation: QuantizedActivation, weights: Sequence[Sequence[Tensor | None]], out_dtype: torch.dtype = torch.float16
) -> list[Tensor]:
    """fp8_gemm_ref of every weight.

    Args:
        activation: codes (M, K) e4m3. weights: 1 to 3 LinearWeights, or tuples of their fields, of equal shape (N, K) e4m3;
            their sums are not used.
    Returns: a tensor (M, N) of out_dtype for every weight. The kernel's are views of one (M, 3N) tensor, as int8_gemm_many's.
    Raises: LayoutError if the shapes do not fit.
    """
    layers = checked_fp8_weights(activation, weights)
    return [fp8_gemm_ref(activation, layer.qweight, layer.weight_scale, layer.bias, out_dtype) for layer in layers]
