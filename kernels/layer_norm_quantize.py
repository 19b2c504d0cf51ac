"""LayerNorm whose result is int8 codes, not floats. Formula, checks and reference; kernel in triton_ops."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import LayoutError
from .activation import QuantizedActivation
from .quantize_static import quantize_static_ref
from .quantize_token import check_rows, quantize_token_ref
from .static_scale import StaticScale, check_static_codes

# The kernels hold a row in registers.
MAX_ROW = 8192


def check_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise LayoutError unless x is a float (M, K) that a kernel can hold and weight and bias are (K,)."""
    check_rows(x, "layer_norm_quantize")
    K = x.shape[1]
    if not 0 < K <= MAX_ROW:
        raise LayoutError(f"layer_norm_quantize: rows of {K} values; 1 to {MAX_ROW} fit in registers. Normalise and quantize separately.")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != (K,):
            raise LayoutError(f"layer_norm_quantize: {name} of shape {tuple(vector.shape)}; ({K},) is needed. Pass this norm's own.")


def layer_norm_quantize_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    static: StaticScale | None = None,
    keep_float: bool = False,
    dtype: torch.dtype = torch.int8,
) -> tuple[QuantizedActivation, Tensor | None]:
    """Normalise every row, then quantize it: quantize_token_ref or quantize_static_ref of LayerNorm(x) in fp32.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias per row, var with the divisor K, all fp32;
    codes of y by quantize_token's formula, or quantize_static's if `static` is given.
    Unlike LayerNorm and quantize run one after the other on 16-bit tensors, y is never rounded to 16 bit in between.
    Args:
        x: (M, K) any float dtype, K <= 8192; left unchanged. weight, bias: (K,) any float dtype. eps: > 0.
        static: its samples divide M, of int8 codes; None for one symmetric scale per row. dtype: of the codes.
        keep_float: also return y, for a consumer that needs floats (a LoRA branch).
    Returns: (codes (M, K), scales as of the quantize operation), and y (M, K) in x's dtype or None.
    Raises: LayoutError if the shapes do not fit.
    """
    check_layer_norm(x, weight, bias)
    check_static_codes("layer_norm_quantize", static, dtype)
    y = functional.layer_norm(x.float(), (x.shape[1],), weight.float(), bias.float(), eps)
    if static is None:
        activation = quantize_token_ref(y, dtype)
    else:
        static.rows_per_scale("layer_norm_quantize", x.shape[0], x.shape[0])
        activation = quantize_static_ref(y, static.scale, static.zero_point, static.bucket, static.clipped)
    return activation, y.to(x.dtype) if keep_float else None
