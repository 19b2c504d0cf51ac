"""Matrix product with 4-bit weights, of int8 codes (W4A8) or of floats (W4A16). Formula, checks and reference; kernel in triton_ops."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..errors import LayoutError
from .activation import QuantizedActivation
from .finish import Finish
from .int4_weight import check_int4_weight, expanded_codes
from .int8_gemm import MAX_K, int8_gemm_ref


def check_int4_gemm(
    activation: QuantizedActivation | Tensor,
    qweight: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Raise LayoutError unless the operands of int4_gemm fit together."""
    is_float = isinstance(activation, Tensor)
    rows = activation if is_float else activation.codes
    if rows.ndim != 2 or qweight.ndim != 2 or (not is_float and rows.dtype != torch.int8):
        raise LayoutError(
            f"int4_gemm: {rows.dtype} rows {tuple(rows.shape)} and qweight {tuple(qweight.shape)}; int8 codes or floats (M, K) and packed "
            "rows are needed. Use activation.as_rows() for images; 3x3 weights have 8 bits."
        )
    K, N = rows.shape[1], qweight.shape[0]
    check_int4_weight("int4_gemm", qweight, group_scale, K)
    if K > MAX_K:
        raise LayoutError(f"int4_gemm: {K} terms per output; at most {MAX_K} keep int32 sums exact. Keep this layer in 16 bit.")
    has_zero_point = not is_float and activation.zero_point is not None
    needed = {"weight_scale": weight_scale, "weight_sum": weight_sum if has_zero_point else None, "bias": bias}
    if has_zero_point and weight_sum is None:
        raise LayoutError(f"int4_gemm: a zero point without weight_sum ({N},); pass the int32 sums of the expanded codes over K.")
    for name, vector in needed.items():
        if vector is not None and vector.shape != (N,):
            raise LayoutError(f"int4_gemm: {name} of shape {tuple(vector.shape)}; ({N},) is needed. Pass one entry per output channel.")


def int4_gemm_ref(
    activation: QuantizedActivation | Tensor,
    qweight: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    addend: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor | QuantizedActivation:
    """Linear layer with 4-bit weights. On codes the products and their sum are integers, the result is scaled once.

    y[m, n] = scale[m] * weight_scale[n] * (acc[m, n] - zero_point[m] * weight_sum[n]) + bias[n], or weight_scale[n] * acc[m, n] + bias[n]
    with acc[m, n] = sum_k x[m, k] * code[n, k] * group_scale[k // 64, n], an exact int32 if x are codes, fp32 if they are floats.
    Args:
        activation: codes (M, K); or x itself (M, K), any float dtype, for a layer whose input stays 16 bit.
        qweight: (N, ceil(K / 128) * 64) uint8, group_scale: (ceil(K / 128), N) int32, contiguous; see int4_weight.py.
        weight_scale: (N,) fp32.
        weight_sum: (N,) int32, sum_k code * group_scale. May be None without a zero point.
        bias: (N,) any float dtype, or None.
        addend: (M, N), or (A, N) for M / A rows each, added to y. out_scale, out_zero_point: (S,); store codes. See finish.py.
    Returns: (M, N) out_dtype; with out_scale a QuantizedActivation with codes (M, N).
    Raises: LayoutError if the shapes do not fit, K is no multiple of 64 or above 65535.
    Source of the two levels: QServe (arXiv 2405.04532), section 4.1; there both are unsigned and the first has a zero point.
    """
    check_int4_gemm(activation, qweight, group_scale, weight_scale, weight_sum, bias)
    codes = expanded_codes(qweight, group_scale, (activation if isinstance(activation, Tensor) else activation.codes).shape[1])
    if not isinstance(activation, Tensor):
        extras = {"addend": addend, "out_scale": out_scale, "out_zero_point": out_zero_point}
        return int8_gemm_ref(activation, codes, weight_scale, weight_sum, bias, out_dtype, **extras)
    finish = Finish(addend, out_scale, out_zero_point)
    finish.check("int4_gemm", activation.shape[0], qweight.shape[0])
    y = linear(activation.float(), codes.float()) * weight_scale
    return finish.apply(y if bias is None else y + bias.float(), out_dtype)


def dequantized_int4_gemm(
    activation: QuantizedActivation | Tensor,
    qweight: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    addend: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor | QuantizedActivation:
    """int4_gemm_ref's result up to the rounding of `out_dtype`, without integer products; same arguments, same errors."""
    check_int4_gemm(activation, qweight, group_scale, weight_scale, weight_sum, bias)
    x = activation if isinstance(activation, Tensor) else activation.dequantize(out_dtype)
    finish = Finish(addend, out_scale, out_zero_point)
    finish.check("int4_gemm", x.shape[0], qweight.shape[0])
    weight = (expanded_codes(qweight, group_scale, x.shape[1]).float() * weight_scale[:, None]).to(out_dtype)
    y = linear(x.to(out_dtype), weight, None if bias is None else bias.to(out_dtype))
    return y if finish.is_plain else finish.apply(y.float(), out_dtype)
