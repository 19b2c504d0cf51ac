"""fp8 (e4m3) matrix product with scales, bias and addend. Formula, checks and reference; kernel in triton_ops.

For GPUs whose table says that fp8 measured faster than int8 (tables.compute_type): its codes carry 3 bits of
mantissa, and Hopper's tensor cores sum fp8 products with fewer bits than fp32, so it is the less exact of the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import FP8, QuantizedActivation
from .finish import Finish
from .int8_gemm import check_segments, check_weight_codes


def check_symmetric(operation: str, activation: QuantizedActivation, second: QuantizedActivation | None) -> None:
    """Raise LayoutError if an activation has a zero point: floating-point codes need none."""
    if any(segment is not None and segment.zero_point is not None for segment in (activation, second)):
        raise LayoutError(f"{operation}: an activation with a zero point; fp8 codes are symmetric. Use int8 for an asymmetric layer.")


def check_fp8_gemm(
    activation: QuantizedActivation, qweight: Tensor, weight_scale: Tensor, bias: Tensor | None, second: QuantizedActivation | None
) -> None:
    """Raise LayoutError unless the operands of fp8_gemm fit together."""
    if activation.codes.ndim != 2 or qweight.ndim != 2:
        raise LayoutError(
            f"fp8_gemm: codes {tuple(activation.codes.shape)} and qweight {tuple(qweight.shape)}; (M, K) and (N, K) are needed. "
            "Use activation.as_rows() for images, fp8_conv2d for 3x3 weights."
        )
    check_segments("fp8_gemm", activation, second, FP8)
    check_symmetric("fp8_gemm", activation, second)
    K = activation.codes.shape[1] + (0 if second is None else second.codes.shape[1])
    check_weight_codes("fp8_gemm", qweight, weight_scale, K, bias, FP8)


def fp8_gemm_ref(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    second: QuantizedActivation | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """Linear layer on fp8 codes: products and sums in fp32, the result is scaled once.

    y[m, n] = scale[m] * weight_scale[n] * sum_k codes[m, k] * qweight[n, k] + bias[n] + addend
    Args:
        activation: codes (M, K) e4m3, no zero point. second: codes (M, K2) with scales of its own, or None.
        qweight: (N, K + K2) e4m3, K contiguous. weight_scale: (N,) fp32. bias: (N,) any float dtype, or None.
        addend: (M, N), or (A, N) for M / A rows each; see finish.py.
    Returns: (M, N) out_dtype.
    Raises: LayoutError if the shapes do not fit.
    """
    check_fp8_gemm(activation, qweight, weight_scale, bias, second)
    finish = Finish(addend)
    finish.check("fp8_gemm", activation.rows, qweight.shape[0])
    K = activation.codes.shape[1]
    y = _sums(activation, qweight[:, :K])
    if second is not None:
        y += _sums(second, qweight[:, K:])
    y *= weight_scale
    if bias is not None:
        y += bias.float()
    return finish.apply(y, out_dtype)


def _sums(activation: QuantizedActivation, qweight: Tensor) -> Tensor:
    return activation.codes.float() @ qweight.float().t() * activation.per_row(activation.scale)[:, None]
