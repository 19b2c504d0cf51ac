"""int8 matrix product that ends in GEGLU, so that its (M, 2N) result is never written. Formula, checks and reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import LayoutError
from .activation import QuantizedActivation
from .int8_gemm import check_gemm, int8_gemm_ref
from .quantize_static import quantize_static_ref
from .static_scale import StaticScale

OPERATION = "int8_geglu_gemm"


def check_geglu_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    static: StaticScale | None,
) -> None:
    """Raise LayoutError unless the operands of int8_geglu_gemm fit together."""
    check_gemm(activation, qweight, weight_scale, weight_sum, bias)
    if qweight.shape[0] % 2:
        raise LayoutError(
            f"{OPERATION}: {qweight.shape[0]} output channels; an even number, values before gates, is needed. "
            "Pass the whole weight of the projection."
        )
    if static is not None:
        static.rows_per_scale(OPERATION, activation.rows, activation.rows)


def geglu(y: Tensor) -> Tensor:
    """(M, 2N), values before gates -> (M, N) fp32: value * gelu(gate), the exact erf form."""
    value, gate = y.float().chunk(2, dim=1)
    return value * functional.gelu(gate)


def int8_geglu_gemm_ref(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    static: StaticScale | None = None,
) -> Tensor | QuantizedActivation:
    """A Linear layer and GEGLU on int8 codes; what lies between them is fp32 and never stored.

    y[m, n] = z[m, n] * gelu(z[m, N + n]) with z = int8_gemm's result and gelu(g) = g / 2 * (1 + erf(g / sqrt(2))).
    Args:
        activation: codes (M, K). qweight: (2N, K) int8, K contiguous, the rows of the values before those of the gates.
        weight_scale, weight_sum, bias: (2N,), as of int8_gemm_ref.
        static: store codes, by quantize_static's formula; its samples divide M.
    Returns: (M, N) out_dtype; with `static` a QuantizedActivation with codes (M, N).
    Raises: LayoutError if the shapes do not fit or K > 65535.
    Source: GLU Variants Improve Transformer (arXiv 2002.05202), section 2.
    """
    check_geglu_gemm(activation, qweight, weight_scale, weight_sum, bias, static)
    y = geglu(int8_gemm_ref(activation, qweight, weight_scale, weight_sum, bias, torch.float32))
    return y.to(out_dtype) if static is None else quantize_static_ref(y, static.scale, static.zero_point, static.bucket, static.clipped)
