"""Product with 4-bit weights that ends in GEGLU, so that its (M, 2N) result is never written. Formula, checks and reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import QuantizedActivation
from .int4_gemm import check_int4_gemm, dequantized_int4_gemm, int4_gemm_ref
from .int8_geglu_gemm import geglu
from .quantize_static import quantize_static_ref
from .static_scale import StaticScale

OPERATION = "int4_geglu_gemm"


def check_int4_geglu_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    static: StaticScale | None,
) -> None:
    """Raise LayoutError unless the operands of int4_geglu_gemm fit together."""
    check_int4_gemm(activation, qweight, group_scale, weight_scale, weight_sum, bias)
    if qweight.shape[0] % 2:
        raise LayoutError(
            f"{OPERATION}: {qweight.shape[0]} output channels; an even number, values before gates, is needed. "
            "Pass the whole weight of the projection."
        )
    if static is not None:
        static.rows_per_scale(OPERATION, activation.rows, activation.rows)


def int4_geglu_gemm_ref(
    activation: QuantizedActivation,
    qweight: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    static: StaticScale | None = None,
) -> Tensor | QuantizedActivation:
    """A Linear layer with 4-bit weights and GEGLU on int8 codes; what lies between them is fp32 and never stored.

    y[m, n] = z[m, n] * gelu(z[m, N + n]) with z = int4_gemm's result, as in int8_geglu_gemm_ref.
    Args:
        activation: codes (M, K). qweight: of a weight (2N, K), the rows of the values before those of the gates.
        group_scale, weight_scale, weight_sum, bias: of 2N rows, as of int4_gemm_ref.
        static: store codes, by quantize_static's formula; its samples divide M.
    Returns: (M, N) out_dtype; with `static` a QuantizedActivation with codes (M, N).
    Raises: LayoutError if the shapes do not fit.
    """
    check_int4_geglu_gemm(activation, qweight, group_scale, weight_scale, weight_sum, bias, static)
    z = int4_gemm_ref(activation, qweight, group_scale, weight_scale, weight_sum, bias, torch.float32)
    return _finished(z, out_dtype, static)


def dequantized_int4_geglu_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    static: StaticScale | None = None,
) -> Tensor | QuantizedActivation:
    """int4_geglu_gemm_ref's result up to the rounding of `out_dtype`, without integer products; same arguments, same errors."""
    check_int4_geglu_gemm(activation, qweight, group_scale, weight_scale, weight_sum, bias, static)
    z = dequantized_int4_gemm(activation, qweight, group_scale, weight_scale, weight_sum, bias, out_dtype)
    return _finished(z, out_dtype, static)


def _finished(z: Tensor, out_dtype: torch.dtype, static: StaticScale | None) -> Tensor | QuantizedActivation:
    y = geglu(z)
    return y.to(out_dtype) if static is None else quantize_static_ref(y, static.scale, static.zero_point, static.bucket, static.clipped)
