"""fp8 (e4m3) convolution, NHWC. Formula, checks and reference; kernel in triton_ops. When it is used: fp8_gemm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import QuantizedActivation
from .finish import Finish, as_images, image_addend
from .fp8_gemm import FP8, check_symmetric
from .int8_conv2d import check_geometry, check_kernel_size, output_side
from .int8_gemm import check_segments, check_weight_codes


def check_fp8_conv(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    second: QuantizedActivation | None,
) -> None:
    """Raise LayoutError unless the operands of fp8_conv2d fit together."""
    check_kernel_size(qweight)
    if activation.codes.ndim != 4:
        raise LayoutError(f"fp8_conv2d: codes of shape {tuple(activation.codes.shape)}; NHWC (B, H, W, C) is needed. Pass images.")
    check_segments("fp8_conv2d", activation, second, FP8)
    check_symmetric("fp8_conv2d", activation, second)
    segments = [activation] if second is None else [activation, second]
    kernel = qweight.shape[1]
    terms = kernel * kernel * sum(segment.codes.shape[3] for segment in segments)
    check_weight_codes("fp8_conv2d", qweight, weight_scale, terms, bias, FP8)
    check_geometry("fp8_conv2d", segments, kernel, stride, padding)


def fp8_conv2d_ref(
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
    """Conv2d on fp8 codes: products and sums in fp32, the result is scaled once.

    y[b, n, p] = scale[b] * weight_scale[n] * sum over taps and channels inside the image + bias[n] + addend
    Args:
        activation: codes (B, H, W, C) e4m3, no zero point, one scale per image or per whole number of images.
        second: codes (B, H, W, C2) with scales of its own, or None. qweight: (Cout, kh, kw, C + C2) e4m3, 3x3 or 1x1.
        weight_scale: (Cout,) fp32. bias: (Cout,) any float dtype, or None. stride: 1 or 2. padding: 0, or 1 for 3x3.
        addend: (B, Cout), or (B, Cout, Ho, Wo) channels_last; see finish.py.
    Returns: (B, Cout, Ho, Wo) out_dtype with channels_last strides.
    Raises: LayoutError if the shapes do not fit.
    """
    check_fp8_conv(activation, qweight, weight_scale, bias, stride, padding, second)
    B, H, W, C = activation.codes.shape
    Cout, kernel = qweight.shape[:2]
    Ho, Wo = output_side(H, kernel, stride, padding), output_side(W, kernel, stride, padding)
    finish = Finish(image_addend("fp8_conv2d", addend, B, Cout, Ho, Wo))
    finish.check("fp8_conv2d", B * Ho * Wo, Cout)
    y = _sums(activation, qweight[..., :C], stride, padding)
    if second is not None:
        y += _sums(second, qweight[..., C:], stride, padding)
    y *= weight_scale
    if bias is not None:
        y += bias.float()
    return as_images(finish.apply(y, out_dtype), B, Ho, Wo)


def _sums(activation: QuantizedActivation, qweight: Tensor, stride: int, padding: int) -> Tensor:
    """(B * Ho * Wo, Cout) fp32, with the activation's scale."""
    B, H, W, _ = activation.codes.shape
    x = activation.codes.float().permute(0, 3, 1, 2)
    y = torch.nn.functional.conv2d(x, qweight.float().permute(0, 3, 1, 2), None, stride, padding)
    y *= activation.per_row(activation.scale)[:: H * W].view(B, 1, 1, 1)
    return y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])
