"""fp8 matrix product, GEGLU and the codes for the next fp8 layer. Formula, checks and reference; kernels in triton_ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import FP8, QuantizedActivation
from .fp8_gemm import check_fp8_gemm, fp8_gemm_ref
from .int8_geglu_gemm import check_static_geglu, geglu, static_codes
from .quantize_token import quantize_token_ref
from .static_scale import StaticScale


def check_fp8_geglu_gemm(
    activation: QuantizedActivation, qweight: Tensor, weight_scale: Tensor, bias: Tensor | None, static: StaticScale | None
) -> None:
    """Raise LayoutError unless the operands of fp8_geglu_gemm fit together."""
    check_fp8_gemm(activation, qweight, weight_scale, bias, None)
    if qweight.shape[0] % 2:
        raise LayoutError(
            f"fp8_geglu_gemm: {qweight.shape[0]} output channels; an even number, values before gates, is needed. "
            "Pass the whole weight of the projection."
        )
    check_static_geglu("fp8_geglu_gemm", static, activation.rows, FP8)


def fp8_geglu_gemm_ref(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    static: StaticScale | None = None,
) -> QuantizedActivation:
    """A Linear layer and GEGLU on fp8 codes, quantized per token, or by a scale that is known before.

    y[m, n] = z[m, n] * gelu(z[m, N + n]) with z = fp8_gemm's result and gelu(g) = g / 2 * (1 + erf(g / sqrt(2)));
    codes by quantize_token's formula. The kernels write z or y once, in `dtype`; here both stay fp32.
    With `static`: codes = y / scale rounded to e4m3 within +-448, straight from the product. Its 15 binary orders of normal
    numbers make a scale that is 2^8 too large cost nothing.
    Args:
        activation: codes (M, K) e4m3. qweight: (2N, K) e4m3, K contiguous, the rows of the values before those of the gates.
        weight_scale, bias: (2N,), as of fp8_gemm_ref. static: in units of fp8 codes; its samples divide M.
    Returns: codes (M, N) e4m3 with a scale per row, or per sample of `static`.
    Raises: LayoutError if the shapes do not fit.
    Source: GLU Variants Improve Transformer (arXiv 2002.05202), section 2.
    """
    check_fp8_geglu_gemm(activation, qweight, weight_scale, bias, static)
    return fp8_codes_of(geglu(fp8_gemm_ref(activation, qweight, weight_scale, bias, torch.float32)), static)


def fp8_codes_of(y: Tensor, static: StaticScale | None) -> QuantizedActivation:
    """Codes of y (M, N) fp32, per token or by the stored scale."""
    return quantize_token_ref(y, FP8) if static is None else static_codes(y, static, FP8)
