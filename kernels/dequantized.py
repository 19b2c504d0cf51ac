"""The fallback without integer or fp8 compute: codes are dequantized and multiplied in the output's float dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear

from .activation import QuantizedActivation
from .finish import Finish, as_images, image_addend
from .fp8_conv2d import check_fp8_conv
from .fp8_geglu_gemm import check_fp8_geglu_gemm, fp8_codes_of
from .fp8_gemm import check_fp8_gemm
from .fp8_gemm_many import checked_fp8_weights
from .int8_conv2d import check_conv
from .int8_geglu_gemm import check_geglu_gemm, geglu, static_codes
from .int8_gemm import check_gemm
from .int8_gemm_many import checked_weights
from .int8_upsample_conv2d import PhaseWeight, check_upsample
from .static_scale import StaticScale


def dequantized_gemm(
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
    """int8_gemm_ref's result up to the rounding of `out_dtype`; same arguments, same errors."""
    check_gemm(activation, qweight, weight_scale, weight_sum, bias, second)
    return _linear("int8_gemm", activation, second, qweight, weight_scale, bias, out_dtype, Finish(addend, out_scale, out_zero_point))


def dequantized_gemm_many(
    activation: QuantizedActivation, weights: Sequence[Sequence[Tensor | None]], out_dtype: torch.dtype = torch.float16
) -> list[Tensor]:
    """int8_gemm_many_ref's results up to the rounding of `out_dtype`; same arguments, same errors."""
    return [dequantized_gemm(activation, *layer, out_dtype) for layer in checked_weights(activation, weights)]


def dequantized_geglu_gemm(
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
    """int8_geglu_gemm_ref's result up to the rounding of `out_dtype`; same arguments, same errors."""
    check_geglu_gemm(activation, qweight, weight_scale, weight_sum, bias, static, codes)
    y = geglu(_linear("int8_geglu_gemm", activation, None, qweight, weight_scale, bias, out_dtype, Finish()))
    return y.to(out_dtype) if static is None else static_codes(y, static, codes)


def dequantized_fp8_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    second: QuantizedActivation | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """fp8_gemm_ref's result up to the rounding of `out_dtype`; same arguments, same errors."""
    check_fp8_gemm(activation, qweight, weight_scale, bias, second)
    return _linear("fp8_gemm", activation, second, qweight, weight_scale, bias, out_dtype, Finish(addend))


def dequantized_fp8_gemm_many(
    activation: QuantizedActivation, weights: Sequence[Sequence[Tensor | None]], out_dtype: torch.dtype = torch.float16
) -> list[Tensor]:
    """fp8_gemm_many_ref's results up to the rounding of `out_dtype`; same arguments, same errors."""
    layers = checked_fp8_weights(activation, weights)
    return [dequantized_fp8_gemm(activation, layer.qweight, layer.weight_scale, layer.bias, out_dtype) for layer in layers]


def dequantized_fp8_geglu_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    static: StaticScale | None = None,
) -> QuantizedActivation:
    """fp8_geglu_gemm_ref's result up to the rounding of `dtype`; same arguments, same errors."""
    check_fp8_geglu_gemm(activation, qweight, weight_scale, bias, static)
    return fp8_codes_of(geglu(_linear("fp8_geglu_gemm", activation, None, qweight, weight_scale, bias, dtype, Finish())), static)


def _linear(
    operation: str,
    activation: QuantizedActivation,
    second: QuantizedActivation | None,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    finish: Finish,
) -> Tensor | QuantizedActivation:
    finish.check(operation, activation.rows, qweight.shape[0])
    weight = (qweight.float() * weight_scale[:, None]).to(out_dtype)
    y = linear(_floats(activation, second, out_dtype), weight, None if bias is None else bias.to(out_dtype))
    return y if finish.is_plain else finish.apply(y.float(), out_dtype)


def _floats(activation: QuantizedActivation, second: QuantizedActivation | None, dtype: torch.dtype) -> Tensor:
    """The concatenation of both segments."""
    x = activation.dequantize(dtype)
    return x if second is None else torch.cat([x, second.dequantize(dtype)], -1)


def dequantized_conv2d(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    border_sums: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    out_dtype: torch.dtype = torch.float16,
    *,
    second: QuantizedActivation | None = None,
    addend: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor | QuantizedActivation:
    """int8_conv2d_ref's result up to the rounding of `out_dtype`; same arguments, same errors."""
    check_conv(activation, qweight, weight_scale, border_sums, bias, stride, padding, second)
    weight = _oihw(qweight, weight_scale, out_dtype)
    y = conv2d(
        _floats(activation, second, out_dtype).permute(0, 3, 1, 2), weight, None if bias is None else bias.to(out_dtype), stride, padding
    )
    return _finished("int8_conv2d", y, addend, out_scale, out_zero_point)


def dequantized_fp8_conv2d(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    out_dtype: torch.dtype = torch.float16,
    *,
    second: QuantizedActivation | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """fp8_conv2d_ref's result up to the rounding of `out_dtype`; same arguments, same errors."""
    check_fp8_conv(activation, qweight, weight_scale, bias, stride, padding, second)
    weight = _oihw(qweight, weight_scale, out_dtype)
    y = conv2d(
        _floats(activation, second, out_dtype).permute(0, 3, 1, 2), weight, None if bias is None else bias.to(out_dtype), stride, padding
    )
    return _finished("fp8_conv2d", y, addend, None, None)


def dequantized_upsample_conv2d(
    activation: QuantizedActivation,
    weight: PhaseWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    addend: Tensor | None = None,
) -> Tensor:
    """int8_upsample_conv2d_ref's result up to the rounding of `out_dtype`; same arguments, same errors."""
    check_upsample(activation, weight, bias)
    x = activation.dequantize(out_dtype).permute(0, 3, 1, 2)
    B, _, H, W = x.shape
    y = x.new_empty(B, weight.scale.shape[1], 2 * H, 2 * W).contiguous(memory_format=torch.channels_last)
    for phase in range(len(weight.codes)):
        p, q = divmod(phase, 2)
        padded = torch.nn.functional.pad(x, (1 - q, q, 1 - p, p))
        kernel = _oihw(weight.codes[phase], weight.scale[phase], out_dtype)
        y[:, :, p::2, q::2] = conv2d(padded, kernel, None if bias is None else bias.to(out_dtype))
    return _finished("int8_upsample_conv2d", y, addend, None, None)


def _oihw(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.float() * scale.view(-1, 1, 1, 1)).to(dtype).permute(0, 3, 1, 2)


def _finished(
    operation: str, y: Tensor, addend: Tensor | None, out_scale: Tensor | None, out_zero_point: Tensor | None
) -> Tensor | QuantizedActivation:
    """y (B, N, Ho, Wo) with what follows it, channels_last."""
    B, N, Ho, Wo = y.shape
    finish = Finish(image_addend(operation, addend, B, N, Ho, Wo), out_scale, out_zero_point)
    finish.check(operation, B * Ho * Wo, N)
    if finish.is_plain:
        return y.contiguous(memory_format=torch.channels_last)
    return as_images(finish.apply(y.permute(0, 2, 3, 1).reshape(-1, N).float(), y.dtype), B, Ho, Wo)
