"""int8 convolution, NHWC, zero padding exact with a zero point. Formula, checks and reference; kernel in triton_ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import QuantizedActivation
from .exact_matmul import scaled_matmul_int8
from .finish import Finish, as_images, image_addend
from .int8_gemm import check_segments, check_weight_codes

# Which taps fall outside the image: (first row) + 2 * (last row), times 4, plus the same for columns.
BORDER_CLASSES = 16
# Output pixels whose unfolded codes exist at a time: 4096 * 9 * 320 codes are 11 MiB.
PIXELS_PER_BLOCK = 4096


def border_sums(qweight: Tensor) -> Tensor:
    """Sums of the weight codes that meet image, not padding, for each border class.

    Class 4 * r + c: bit 0 of r says that the first row of taps falls outside the image, bit 1 that the last one does;
    c the same for columns. Both bits occur where a side has length 1. Entry 0 is the plain sum over all taps.
    Args:
        qweight: (Cout, kh, kw, Cin) int8, 3x3, or 1x1, which has no padding: all its entries are the plain sum.
    Returns: (16, Cout) int32.
    Raises: LayoutError for other kernel sizes.
    """
    check_kernel_size(qweight)
    taps = qweight.sum(-1, dtype=torch.int32)  # (Cout, kh, kw)
    kernel = taps.shape[1]
    if kernel == 1:
        return taps.view(1, -1).repeat(BORDER_CLASSES, 1)
    inside = inside_taps(kernel, qweight.device)
    by_row = (taps[None] * inside[:, None, :, None]).sum(2, dtype=torch.int32)  # (4, Cout, 3)
    by_class = (by_row[:, None] * inside[None, :, None, :]).sum(3, dtype=torch.int32)  # (4, 4, Cout)
    return by_class.view(BORDER_CLASSES, -1)


def inside_taps(kernel: int, device: torch.device) -> Tensor:
    """(4, kernel) int32: which taps along one side stay inside; bit 0 of the row's index: the first is out, bit 1: the last."""
    inside = torch.ones(4, kernel, dtype=torch.int32, device=device)
    inside[1::2, 0] = 0
    inside[2:, -1] = 0
    return inside


def check_kernel_size(qweight: Tensor) -> None:
    """Raise LayoutError unless qweight is (Cout, 3, 3, Cin) or (Cout, 1, 1, Cin)."""
    if qweight.ndim != 4 or tuple(qweight.shape[1:3]) not in ((3, 3), (1, 1)):
        raise LayoutError(
            f"int8_conv2d: qweight of shape {tuple(qweight.shape)}; (Cout, 3, 3, Cin) or (Cout, 1, 1, Cin) is needed. "
            "Keep this layer in 16 bit."
        )


def check_conv(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    border_sums: Tensor | None,
    bias: Tensor | None,
    stride: int,
    padding: int,
    second: QuantizedActivation | None = None,
) -> None:
    """Raise LayoutError unless the operands of int8_conv2d fit together."""
    check_kernel_size(qweight)
    if activation.codes.ndim != 4:
        raise LayoutError(f"int8_conv2d: codes of shape {tuple(activation.codes.shape)}; NHWC (B, H, W, C) is needed. Use quantize_image.")
    check_segments("int8_conv2d", activation, second, torch.int8)
    segments = [activation] if second is None else [activation, second]
    kernel = qweight.shape[1]
    C = sum(segment.codes.shape[3] for segment in segments)
    check_weight_codes("int8_conv2d", qweight, weight_scale, kernel * kernel * C, bias)
    check_geometry("int8_conv2d", segments, kernel, stride, padding)
    shape = (BORDER_CLASSES, qweight.shape[0]) if second is None else (2, BORDER_CLASSES, qweight.shape[0])
    if any(segment.zero_point is not None for segment in segments) and (border_sums is None or border_sums.shape != shape):
        raise LayoutError(f"int8_conv2d: a zero point without border_sums {shape}; pass border_sums(qweight), one table per segment.")


def check_geometry(operation: str, segments: list[QuantizedActivation], kernel: int, stride: int, padding: int) -> None:
    """Raise LayoutError unless the kernels can slide over these NHWC activations so, and each image has one scale."""
    _, H, W, _ = segments[0].codes.shape
    if stride not in (1, 2) or padding not in (0, kernel // 2) or min(H, W) + 2 * padding < kernel:
        raise LayoutError(
            f"{operation}: stride {stride}, padding {padding} for a {kernel}x{kernel} kernel on {H}x{W} pixels; "
            f"stride 1 or 2 and padding 0 or {kernel // 2} are supported. Keep this layer in 16 bit."
        )
    for segment in segments:
        if segment.rows_per_scale % (H * W):
            raise LayoutError(
                f"{operation}: one scale per {segment.rows_per_scale} pixels of {H}x{W} images; "
                "pixels of one image share a sum. Use one scale per image, or one for all."
            )


def output_side(side: int, kernel: int, stride: int, padding: int) -> int:
    """Length of an output side in pixels."""
    return (side + 2 * padding - kernel) // stride + 1


def border_class(H: int, W: int, kernel: int, stride: int, padding: int, device: torch.device) -> Tensor:
    """(Ho, Wo) int64: the row of border_sums that each output pixel needs."""

    def along(side: int) -> Tensor:
        first = torch.arange(output_side(side, kernel, stride, padding), device=device) * stride - padding
        return (first < 0).long() + 2 * (first + kernel - 1 >= side).long()

    return 4 * along(H)[:, None] + along(W)


def unfold(codes: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """(B, H, W, C) -> (B * Ho * Wo, kernel * kernel * C), terms in the weight's order (row, column, channel)."""
    codes = torch.nn.functional.pad(codes, (0, 0, padding, padding, padding, padding)).contiguous()
    B, H, W, C = codes.shape
    b, h, w, _ = codes.stride()
    shape = (B, output_side(H, kernel, stride, 0), output_side(W, kernel, stride, 0), kernel, kernel * C)
    # The taps of one kernel row lie side by side in NHWC, so that they are one run of kernel * C codes.
    return codes.as_strided(shape, (b, h * stride, w * stride, h, 1)).reshape(-1, kernel * kernel * C)


def int8_conv2d_ref(
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
    """Conv2d on int8 codes: the products and their sum are integers, the result is scaled once.

    y[b, n, p] = scale[b] * weight_scale[n] * (acc[b, p, n] - zero_point[b] * border_sums[class(p), n]) + bias[n]
    with acc the exact int32 sum over the taps and channels inside the image. Padding is a true 0, whose code would be the
    zero point: it is left out of acc, and border_sums holds the weight codes of the taps that are inside.
    With a second segment, the channels that a concatenation would append, its own such term is added before the bias.
    Args:
        activation: codes (B, H, W, C), one scale per image or per whole number of images.
        second: codes (B, H, W, C2) with scales of its own, or None.
        qweight: (Cout, kh, kw, C + C2) int8, 3x3 or 1x1. weight_scale: (Cout,) fp32.
        border_sums: (16, Cout) int32 from border_sums(); with a second segment (2, 16, Cout), of each segment's channels.
            May be None if the activations are symmetric.
        bias: (Cout,) any float dtype, or None. stride: 1 or 2. padding: 0, or 1 for 3x3.
        addend: added to y; (B, Cout), or (B, Cout, Ho, Wo) channels_last. out_scale, out_zero_point: (S,); store codes. See finish.py.
    Returns: (B, Cout, Ho, Wo) out_dtype with channels_last strides; with out_scale a QuantizedActivation with codes (B, Ho, Wo, Cout).
    Raises: LayoutError if the shapes do not fit.
    Source of two segments: Q-Diffusion (arXiv 2302.04304), section 4.2, shortcut splitting.
    """
    check_conv(activation, qweight, weight_scale, border_sums, bias, stride, padding, second)
    B, H, W, C = activation.codes.shape
    Cout, kernel = qweight.shape[:2]
    Ho, Wo = output_side(H, kernel, stride, padding), output_side(W, kernel, stride, padding)
    finish = Finish(image_addend("int8_conv2d", addend, B, Cout, Ho, Wo), out_scale, out_zero_point)
    finish.check("int8_conv2d", B * Ho * Wo, Cout)
    geometry = (stride, padding, Ho, Wo)
    if second is None:
        y_dtype = out_dtype if finish.is_plain else torch.float32
        y = _one_segment(activation, qweight, weight_scale, border_sums, bias, *geometry, y_dtype)
    else:
        sums = (None, None) if border_sums is None else border_sums
        y = _one_segment(activation, qweight[..., :C], weight_scale, sums[0], bias, *geometry, torch.float32)
        y += _one_segment(second, qweight[..., C:], weight_scale, sums[1], None, *geometry, torch.float32)
    return as_images(finish.apply(y, out_dtype), B, Ho, Wo)


def _one_segment(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    border_sums: Tensor | None,
    bias: Tensor | None,
    stride: int,
    padding: int,
    Ho: int,
    Wo: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """(B * Ho * Wo, Cout), a few images at a time."""
    B, H, W, _ = activation.codes.shape
    Cout, kernel = qweight.shape[:2]
    pixels, symmetric = Ho * Wo, activation.zero_point is None
    step = min(B, max(1, PIXELS_PER_BLOCK // pixels))  # images
    image_scale = activation.per_row(activation.scale)[:: H * W].repeat_interleave(pixels)
    row_zero_point = halo = None
    if not symmetric:
        row_zero_point = activation.per_row(activation.zero_point)[:: H * W].repeat_interleave(pixels)
        halo = border_sums[border_class(H, W, kernel, stride, padding, qweight.device).view(-1)].repeat(step, 1)
    y = torch.empty(B * pixels, Cout, dtype=out_dtype, device=qweight.device)
    for b in range(0, B, step):
        rows = slice(b * pixels, (b + step) * pixels)
        scaled_matmul_int8(
            unfold(activation.codes[b : b + step], kernel, stride, padding),
            qweight.reshape(Cout, -1),
            image_scale[rows],
            weight_scale,
            None if symmetric else row_zero_point[rows],
            halo,
            None if bias is None else bias.float(),
            y[rows],
        )
    return y
