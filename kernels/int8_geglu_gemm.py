"""int8 matrix product that ends in GEGLU, so that its (M, 2N) result is never written. Formula, checks and reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import LayoutError
from .activation import QuantizedActivation
from .int8_gemm import check_gemm, int8_gemm_ref
from .quantize_static import quantize_static_ref
from .quantize_token import symmetric_codes
from .static_scale import StaticScale

OPERATION = "int8_geglu_gemm"


def check_geglu_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    static: StaticScale | None,
    codes: torch.dtype = torch.int8,
) -> None:
    """Raise LayoutError unless the operands of int8_geglu_gemm fit together."""
    check_gemm(activation, qweight, weight_scale, weight_sum, bias)
    if qweight.shape[0] % 2:
        raise LayoutError(
            f"{OPERATION}: {qweight.shape[0]} output channels; an even number, values before gates, is needed. "
            "Pass the whole weight of the projection."
        )
    check_static_geglu(OPERATION, static, activation.rows, codes)


def check_static_geglu(operation: str, static: StaticScale | None, rows: int, codes: torch.dtype) -> None:
    """Raise LayoutError unless the stored scale fits the rows, and has no zero point if the codes are fp8."""
    if static is not None:
        static.rows_per_scale(operation, rows, rows)
    if static is not None and static.zero_point is not None and codes is not torch.int8:
        raise LayoutError(f"{operation}: a zero point for {codes} codes, which are symmetric. Pass a scale alone.")


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
    codes: torch.dtype = torch.int8,
) -> Tensor | QuantizedActivation:
    """A Linear layer and GEGLU on int8 codes; what lies between them is fp32 and never stored.

    y[m, n] = z[m, n] * gelu(z[m, N + n]) with z = int8_gemm's result and gelu(g) = g / 2 * (1 + erf(g / sqrt(2))).
    Args:
        activation: codes (M, K). qweight: (2N, K) int8, K contiguous, the rows of the values before those of the gates.
        weight_scale, weight_sum, bias: (2N,), as of int8_gemm_ref.
        static: store codes, by quantize_static's formula; its samples divide M. codes: their dtype; of float8_e4m3fn, which have no
            zero point, y / scale is rounded to the nearest number within +-448.
    Returns: (M, N) out_dtype; with `static` a QuantizedActivation with codes (M, N).
    Raises: LayoutError if the shapes do not fit or K > 65535.
    Source: GLU Variants Improve Transformer (arXiv 2002.05202), section 2.
    """
    check_geglu_gemm(activation, qweight, weight_scale, weight_sum, bias, static, codes)
    y = geglu(int8_gemm_ref(activation, qweight, weight_scale, weight_sum, bias, torch.float32))
    return y.to(out_dtype) if static is None else static_codes(y, static, codes)


def static_codes(y: Tensor, static: StaticScale, codes: torch.dtype) -> QuantizedActivation:
    """Codes of y (M, N) fp32 by a stored scale, as int8_geglu_gemm and fp8_geglu_gemm store them."""
    if codes is torch.int8:
        return quantize_static_ref(y, static.scale, static.zero_point, static.bucket, static.clipped)
    scale = static.scale.index_select(0, static.bucket)
    rows = y.shape[0] // scale.numel()
    return QuantizedActivation(symmetric_codes(y / scale.repeat_interleave(rows)[:, None], codes), scale, None, rows)
