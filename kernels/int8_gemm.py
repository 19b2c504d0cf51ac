"""int8 matrix product with scales, zero points, bias and addend. Formula, checks and reference; kernel in triton_ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import QuantizedActivation
from .exact_matmul import scaled_matmul_int8
from .finish import Finish

# Above this, |acc| + |zero_point * weight_sum| <= K * 2 * 128 * 128 may pass 2^31.
MAX_K = 65_535


def check_weight_codes(
    operation: str, qweight: Tensor, weight_scale: Tensor, K: int, bias: Tensor | None, dtype: torch.dtype = torch.int8
) -> None:
    """Raise LayoutError unless qweight is of dtype with K terms per output channel, and scale and bias have one entry per channel."""
    N = qweight.shape[0]
    if qweight.dtype != dtype or qweight[0].numel() != K or K > MAX_K:
        raise LayoutError(
            f"{operation}: qweight is {qweight.dtype} {tuple(qweight.shape)} for {K} terms per output; "
            f"{dtype} with as many terms, at most {MAX_K}, is needed. Quantize this layer's own weight."
        )
    for name, vector in (("weight_scale", weight_scale), ("bias", bias)):
        if vector is not None and vector.shape != (N,):
            raise LayoutError(f"{operation}: {name} of shape {tuple(vector.shape)}; ({N},) is needed. Pass one entry per output channel.")


def check_segments(operation: str, activation: QuantizedActivation, second: QuantizedActivation | None, dtype: torch.dtype) -> None:
    """Raise LayoutError unless the activations have codes of dtype, and the second's shape is the first's but for the channels."""
    for segment in (activation, second):
        if segment is not None and segment.codes.dtype != dtype:
            raise LayoutError(f"{operation}: codes are {segment.codes.dtype}; {dtype} is needed. Quantize to the layer's compute type.")
    if second is not None and second.codes.shape[:-1] != activation.codes.shape[:-1]:
        raise LayoutError(
            f"{operation}: second segment of shape {tuple(second.codes.shape)} beside {tuple(activation.codes.shape)}; "
            "only the channels may differ. Pass the two inputs of one concatenation."
        )


def check_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    second: QuantizedActivation | None = None,
) -> None:
    """Raise LayoutError unless the operands of int8_gemm fit together."""
    if activation.codes.ndim != 2 or qweight.ndim != 2:
        raise LayoutError(
            f"int8_gemm: codes {tuple(activation.codes.shape)} and qweight {tuple(qweight.shape)}; (M, K) and (N, K) are needed. "
            "Use activation.as_rows() for images, int8_conv2d for 3x3 weights."
        )
    check_segments("int8_gemm", activation, second, torch.int8)
    segments = [activation] if second is None else [activation, second]
    check_weight_codes("int8_gemm", qweight, weight_scale, sum(segment.codes.shape[1] for segment in segments), bias)
    shape = weight_scale.shape if second is None else (2, *weight_scale.shape)
    if any(segment.zero_point is not None for segment in segments) and (weight_sum is None or weight_sum.shape != shape):
        raise LayoutError(
            f"int8_gemm: a zero point without weight_sum {tuple(shape)}; pass the int32 sums of qweight over K, a row per segment of K."
        )


def int8_gemm_ref(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    second: QuantizedActivation | None = None,
    addend: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor | QuantizedActivation:
    """Linear layer on int8 codes: the products and their sum are integers, the result is scaled once.

    y[m, n] = scale[m] * weight_scale[n] * (acc[m, n] - zero_point[m] * weight_sum[n]) + bias[n]
    with acc[m, n] = sum_k codes[m, k] * qweight[n, k], exact int32; scale[m] is the activation's entry of row m.
    With a second segment, the channels that a concatenation would append, its own such term is added before the bias.
    Args:
        activation: codes (M, K). second: codes (M, K2) with scales of its own, or None.
        qweight: (N, K + K2) int8, K contiguous. weight_scale: (N,) fp32.
        weight_sum: (N,) int32, sum_k qweight[n, k]; with a second segment (2, N), each segment's sum. May be None if the
            activations are symmetric.
        bias: (N,) any float dtype, or None.
        addend: (M, N), or (A, N) for M / A rows each, added to y. out_scale, out_zero_point: (S,); store codes. See finish.py.
    Returns: (M, N) out_dtype; with out_scale a QuantizedActivation with codes (M, N).
    Raises: LayoutError if the shapes do not fit or K + K2 > 65535.
    Source of two segments: Q-Diffusion (arXiv 2302.04304), section 4.2, shortcut splitting.
    """
    finish = Finish(addend, out_scale, out_zero_point)
    check_gemm(activation, qweight, weight_scale, weight_sum, bias, second)
    finish.check("int8_gemm", activation.rows, qweight.shape[0])
    if second is None:
        y = _one_segment(activation, qweight, weight_scale, weight_sum, bias, out_dtype if finish.is_plain else torch.float32)
        return y if finish.is_plain else finish.apply(y, out_dtype)
    K = activation.codes.shape[1]
    sums = (None, None) if weight_sum is None else weight_sum
    y = _one_segment(activation, qweight[:, :K], weight_scale, sums[0], bias, torch.float32)
    y += _one_segment(second, qweight[:, K:], weight_scale, sums[1], None, torch.float32)
    return finish.apply(y, out_dtype)


def _one_segment(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    N, symmetric = qweight.shape[0], activation.zero_point is None
    y = torch.empty(activation.rows, N, dtype=out_dtype, device=qweight.device)
    scaled_matmul_int8(
        activation.codes,
        qweight,
        activation.per_row(activation.scale),
        weight_scale,
        None if symmetric else activation.per_row(activation.zero_point),
        None if symmetric else weight_sum.view(1, N),
        None if bias is None else bias.float(),
        y,
    )
    return y
