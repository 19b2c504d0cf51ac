"""GEGLU whose result is int8 codes, not floats. Formula, checks and reference; kernel in triton_ops."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import LayoutError
from .activation import QuantizedActivation
from .layer_norm_quantize import MAX_ROW
from .quantize_static import quantize_static_ref
from .quantize_token import check_rows, quantize_token_ref
from .static_scale import StaticScale, check_static_codes


def check_geglu(x: Tensor) -> None:
    """Raise LayoutError unless x is a float (M, 2N) whose halves a kernel can hold."""
    check_rows(x, "geglu_quantize")
    width = x.shape[1]
    if width % 2 or not 0 < width <= 2 * MAX_ROW:
        raise LayoutError(
            f"geglu_quantize: rows of {width} values; an even number up to {2 * MAX_ROW}, values before gates, is needed. "
            "Activate and quantize separately."
        )


def geglu_quantize_ref(x: Tensor, static: StaticScale | None = None, dtype: torch.dtype = torch.int8) -> QuantizedActivation:
    """Gate every row, then quantize it: quantize_token_ref or quantize_static_ref of GEGLU(x) in fp32.

    y[m, n] = x[m, n] * gelu(x[m, N + n]) with gelu(g) = g / 2 * (1 + erf(g / sqrt(2))), all fp32;
    codes of y by quantize_token's formula, or quantize_static's if `static` is given. y is never rounded to 16 bit.
    Args:
        x: (M, 2N) any float dtype, N <= 8192; left unchanged.
        static: its samples divide M, of int8 codes; None for one symmetric scale per row. dtype: of the codes.
    Returns: codes (M, N), scales as of the quantize operation.
    Raises: LayoutError if the shapes do not fit.
    Source: GLU Variants Improve Transformer (arXiv 2002.05202), section 2, without its biases.
    """
    check_geglu(x)
    check_static_codes("geglu_quantize", static, dtype)
    value, gate = x.float().chunk(2, dim=1)
    y = value * functional.gelu(gate)
    if static is None:
        return quantize_token_ref(y, dtype)
    static.rows_per_scale("geglu_quantize", x.shape[0], x.shape[0])
    return quantize_static_ref(y, static.scale, static.zero_point, static.bucket, static.clipped)
