"""Triton kernel of channel_group_conv2d. Formula: ../channel_group_conv2d.py; sums: channel_group_accumulate.py."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..channel_group import ChannelGroups
from ..channel_group_conv2d import channel_group_conv2d_ref, check_grouped_conv
from ..design import BOXES
from ..finish import as_images
from ..repeat import empty, launch
from .accumulate import tile_position
from .channel_group_accumulate import grouped_conv_from_descriptors, grouped_conv_from_pointers
from .channel_group_gemm import grouped_constants, grouped_design
from .conv_kernel import _tile_pixels
from .epilogue import finish_tile, in_parts, load_rows, subtract_border
from .int8_conv2d import Geometry, conv_design
from .int8_gemm import divides_k, fitting, optional_bias
from .launch import cdiv, compute_capability, describe, on_device

RUNTIME_ONLY = ["M", "has_bias", "H", "W", "Ho", "Wo", "boxes_h", "boxes_w", "images_per_scale"]


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _channel_group_conv2d_kernel(
    codes, qweight, y_ptr, ends_ptr, shifts_ptr, scale_ptr, zero_point_ptr, weight_scale_ptr, border_sums_ptr,
    bias_ptr, has_bias, M, N, C, H, W, Ho, Wo, boxes_h, boxes_w, images_per_scale,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    TMA: tl.constexpr, EVEN_C: tl.constexpr, UNROLL: tl.constexpr, PARTS: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One output tile. codes and qweight are pointers, or descriptors if TMA."""
    tiles_m = boxes_h * boxes_w * (M // (Ho * Wo)) if TMA else tl.cdiv(M, BLOCK_M)
    tile_m, tile_n = tile_position(tl.program_id(0), tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    image, ho, wo, inside_m, first_h, first_w = _tile_pixels(tile_m, M, Ho, Wo, boxes_h, boxes_w, BOX_H, BOX_W, TMA, BLOCK_M)
    h = ho * STRIDE - PADDING
    w = wo * STRIDE - PADDING
    first_n = tile_n * BLOCK_N
    if TMA:
        acc = grouped_conv_from_descriptors(
            codes, qweight, tl.min(image, axis=0).to(tl.int32), first_h - PADDING, first_w - PADDING, first_n,
            ends_ptr, shifts_ptr, C, KERNEL, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        columns = first_n + tl.arange(0, BLOCK_N)
        w_ptr = qweight + columns[None, :].to(tl.int64) * (KERNEL * KERNEL * C)
        acc = grouped_conv_from_pointers(
            codes, w_ptr, (image * H + h) * W + w, h, w, inside_m, columns < N, ends_ptr, shifts_ptr, W, H, C,
            KERNEL, EVEN_C, UNROLL, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    # Relative to the first image's first pixel: a tile stays within 2^31 elements of it.
    first_image = tl.min(image, axis=0)
    rows = ((image - first_image).to(tl.int32) * Ho + ho) * Wo + wo
    first_row = first_image * (Ho * Wo)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    parts = in_parts(acc, PARTS, BLOCK_M, BLOCK_N)
    entry = image // images_per_scale
    scale = load_rows(scale_ptr, entry, inside_m, 0.0)
    for part in tl.static_range(PARTS):
        sums = parts[part]
        local_n = tl.arange(0, WIDTH)
        first = first_n + part * WIDTH
        inside_n = first + local_n < N
        if zero_point_ptr is not None:
            zero_point = load_rows(zero_point_ptr, entry, inside_m, 0)
            top, bottom = (h < 0).to(tl.int32), (h + (KERNEL - 1) >= H).to(tl.int32)
            left, right = (w < 0).to(tl.int32), (w + (KERNEL - 1) >= W).to(tl.int32)
            sums = subtract_border(sums, zero_point, border_sums_ptr, first + local_n, inside_n, N, top, bottom, left, right)
        finish_tile(
            sums.to(tl.float32) * scale[:, None], y_ptr, first_row, rows, first, local_n, inside_m, inside_n, N, 0,
            weight_scale_ptr, bias_ptr, has_bias, None, 1, None, None, 1,
        )  # fmt: skip


def channel_group_conv2d(
    activation: QuantizedActivation,
    groups: ChannelGroups,
    qweight: Tensor,
    weight_scale: Tensor,
    border_sums: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """See channel_group_conv2d_ref; the integer sums are the same, the scaling may round differently. Finer groups run there."""
    if groups.needs_reference():
        return channel_group_conv2d_ref(activation, groups, qweight, weight_scale, border_sums, bias, stride, padding, out_dtype)
    check_grouped_conv(activation, groups, qweight, weight_scale, border_sums, bias, stride, padding)
    codes, flat_weight = activation.codes.contiguous(), qweight.contiguous().view(qweight.shape[0], -1)
    geometry = Geometry.of(codes, qweight.shape[1], stride, padding)
    (B, H, W, C), N, sm = codes.shape, qweight.shape[0], compute_capability(codes.device)
    Ho, Wo = geometry.Ho, geometry.Wo
    design = grouped_design(fitting(conv_design(codes, None, N, geometry, sm), (codes, None, flat_weight), sm), groups)
    if design.tma and C % design.BLOCK_K:
        design = replace(design, tma=False)
    box = BOXES.get(design.BLOCK_M, (1, 1)) if design.tma else (1, 1)
    boxes = (cdiv(Ho, box[0]), cdiv(Wo, box[1]))
    tiles_m = B * boxes[0] * boxes[1] if design.tma else cdiv(B * Ho * Wo, design.BLOCK_M)
    y = empty((B * Ho * Wo, N), out_dtype, codes.device)
    even = divides_k(design, C)
    constants = grouped_constants(design, sm)
    if activation.zero_point is not None and constants["PARTS"] == 2:
        constants["PARTS"] = 4  # a border class's sums are as many values as a part has columns
    if design.tma:
        codes = describe(codes, [1, *box, design.BLOCK_K])
        flat_weight = describe(flat_weight, [design.BLOCK_N, design.BLOCK_K])
    with on_device(y):
        launch(
            _channel_group_conv2d_kernel, (tiles_m * cdiv(N, design.BLOCK_N),),
            codes, flat_weight, y, groups.ends, groups.shifts,
            activation.scale, activation.zero_point, weight_scale, border_sums, *optional_bias(bias, y),
            B * Ho * Wo, N, C, H, W, Ho, Wo, *boxes, activation.rows_per_scale // (H * W),
            KERNEL=geometry.kernel, STRIDE=stride, PADDING=padding, BOX_H=box[0], BOX_W=box[1],
            EVEN_C=even, **constants,
        )  # fmt: skip
    return as_images(y, B, Ho, Wo)
