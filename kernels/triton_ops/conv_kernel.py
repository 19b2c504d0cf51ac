"""Triton kernel of int8_conv2d, fp8_conv2d and the upsampler: implicit GEMM over NHWC, K in the order (tap, channel)."""

import triton
import triton.language as tl

from .accumulate import conv_from_descriptors, conv_from_pointers, tile_position
from .epilogue import finish_tile, in_parts, load_rows, subtract_border
from .split_k import is_last_to_arrive, total

# Sizes whose value or divisibility must not make another compiled kernel: SDXL's sides and scales come in several.
RUNTIME_ONLY = [
    "M", "has_bias", "H", "W", "Ho", "Wo", "boxes_h", "boxes_w",
    "images_per_scale", "images_per_scale_2", "rows_per_addend", "rows_per_out_scale",
]  # fmt: skip


@triton.jit
def _tile_pixels(tile_m, M, Ho, Wo, boxes_h, boxes_w, BOX_H: tl.constexpr, BOX_W: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr):
    """(BLOCK_M,) image, row, column, inside: of every output pixel of the tile; and the first one's row and column if TMA."""
    local_m = tl.arange(0, BLOCK_M)
    first_h = 0
    first_w = 0
    if TMA:  # a box of neighbouring pixels
        image = tl.zeros((BLOCK_M,), tl.int64) + tile_m // (boxes_h * boxes_w)
        first_h = tile_m // boxes_w % boxes_h * BOX_H
        first_w = tile_m % boxes_w * BOX_W
        ho = first_h + local_m // BOX_W
        wo = first_w + local_m % BOX_W
        inside_m = (ho < Ho) & (wo < Wo)
    else:  # pixels in order
        rows = tile_m.to(tl.int64) * BLOCK_M + local_m
        image = rows // (Ho * Wo)
        pixel = (rows % (Ho * Wo)).to(tl.int32)
        ho = pixel // Wo
        wo = pixel % Wo
        inside_m = rows < M
    return image, ho, wo, inside_m, first_h, first_w


@triton.jit
def _sums(
    codes, qweight, rest_weight, image, h, w, corner_h, corner_w, first_n, columns, inside_m, inside_n, H, W, N, C, C_all, w_offset,
    phase, split,
    KERNEL: tl.constexpr, TMA: tl.constexpr, ACC: tl.constexpr, EVEN_C: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of one segment of channels over all taps, or of this program's part of them: a tuple of (BLOCK_M, BLOCK_N) ACC and, if
    REST_N, those of the next columns."""
    first = 0
    last = KERNEL * KERNEL * tl.cdiv(C, BLOCK_K)
    if SPLIT_K > 1:
        part = tl.cdiv(last, SPLIT_K)
        first = split * part
        last = tl.minimum(last, first + part)
    if TMA:
        sums = conv_from_descriptors(
            codes, qweight, rest_weight, tl.min(image, axis=0).to(tl.int32), corner_h, corner_w, phase * N + first_n, C, w_offset, C_all,
            first, last, KERNEL, ACC, BLOCK_M, BLOCK_N, REST_N, BLOCK_K,
        )  # fmt: skip
    else:
        w_ptr = qweight + w_offset + (phase * N + columns)[None, :].to(tl.int64) * (KERNEL * KERNEL * C_all)
        acc = conv_from_pointers(
            codes, w_ptr, (image * H + h) * W + w, h, w, inside_m, inside_n, W, H, C, C_all, first, last,
            KERNEL, ACC, EVEN_C, UNROLL, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        sums = (acc,)
    return sums


@triton.jit
def _scaled(
    acc, scale_ptr, zero_point_ptr, sums_ptr, sums_offset, image, images_per_scale, columns, inside_m, inside_n, N, h, w, H, W,
    KERNEL: tl.constexpr,
):  # fmt: skip
    """scale[m] * (acc - zero_point[m] * border_sums[class(m), n]), fp32."""
    entry = image.to(tl.int32) // images_per_scale
    if zero_point_ptr is not None:
        zero_point = load_rows(zero_point_ptr, entry, inside_m, 0)
        top, bottom = (h < 0).to(tl.int32), (h + (KERNEL - 1) >= H).to(tl.int32)
        left, right = (w < 0).to(tl.int32), (w + (KERNEL - 1) >= W).to(tl.int32)
        acc = subtract_border(acc, zero_point, sums_ptr + sums_offset, columns, inside_n, N, top, bottom, left, right)
    return acc.to(tl.float32) * load_rows(scale_ptr, entry, inside_m, 0.0)[:, None]


@triton.jit
def _finish(
    acc, acc_2, image, h, w, first_row, local_rows, inside_m, first_n, phase, H, W, N, y_ptr,
    scale_ptr, zero_point_ptr, scale_2_ptr, zero_point_2_ptr, weight_scale_ptr, border_sums_ptr,
    bias_ptr, has_bias, addend_ptr, out_scale_ptr, out_zero_point_ptr,
    images_per_scale, images_per_scale_2, rows_per_addend, rows_per_out_scale,
    KERNEL: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Scale and store WIDTH columns from first_n on; acc_2 are the second segment's sums, or None."""
    local_n = tl.arange(0, WIDTH)
    columns = first_n + local_n
    inside_n = columns < N
    y = _scaled(
        acc, scale_ptr, zero_point_ptr, border_sums_ptr, phase * 16 * N,
        image, images_per_scale, columns, inside_m, inside_n, N, h, w, H, W, KERNEL,
    )  # fmt: skip
    if acc_2 is not None:
        y += _scaled(
            acc_2, scale_2_ptr, zero_point_2_ptr, border_sums_ptr, 16 * N,
            image, images_per_scale_2, columns, inside_m, inside_n, N, h, w, H, W, KERNEL,
        )  # fmt: skip
    finish_tile(
        y, y_ptr, first_row, local_rows, first_n, local_n, inside_m, inside_n, N, phase * N,
        weight_scale_ptr, bias_ptr, has_bias, addend_ptr, rows_per_addend, out_scale_ptr, out_zero_point_ptr, rows_per_out_scale,
    )  # fmt: skip


@triton.jit
def _conv2d_tile(
    tile, tiles_m, tiles_n, codes, codes_2, qweight, rest_weight, y_ptr,
    scale_ptr, zero_point_ptr, scale_2_ptr, zero_point_2_ptr, weight_scale_ptr, border_sums_ptr,
    bias_ptr, has_bias, addend_ptr, out_scale_ptr, out_zero_point_ptr, partial_ptr, counter_ptr,
    M, N, C, C_2, H, W, Ho, Wo, boxes_h, boxes_w, images_per_scale, images_per_scale_2, rows_per_addend, rows_per_out_scale,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, PHASES: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    TMA: tl.constexpr, ACC: tl.constexpr, EVEN_C: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr, PARTS: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    C_all = C
    if codes_2 is not None:
        C_all = C + C_2
    split = tl.program_id(1)
    tiles = PHASES * tiles_m * tiles_n
    phase = tile // (tiles_m * tiles_n)
    tile_m, tile_n = tile_position(tile % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    pad_h = PADDING
    pad_w = PADDING
    if PHASES == 4:
        pad_h = 1 - phase // 2
        pad_w = 1 - phase % 2
    image, ho, wo, inside_m, first_h, first_w = _tile_pixels(tile_m, M, Ho, Wo, boxes_h, boxes_w, BOX_H, BOX_W, TMA, BLOCK_M)
    corner_h = first_h - pad_h
    corner_w = first_w - pad_w
    h = ho * STRIDE - pad_h
    w = wo * STRIDE - pad_w
    first_n = tile_n * (BLOCK_N + REST_N)
    local_n = tl.arange(0, BLOCK_N)
    columns = first_n + local_n
    inside_n = columns < N

    sums = _sums(
        codes, qweight, rest_weight, image, h, w, corner_h, corner_w, first_n, columns, inside_m, inside_n, H, W, N, C, C_all, 0,
        phase, split, KERNEL, TMA, ACC, EVEN_C, UNROLL, SPLIT_K, BLOCK_M, BLOCK_N, REST_N, BLOCK_K,
    )  # fmt: skip
    # Relative to the first image's first pixel: a tile stays within 2^31 elements of it.
    first_image = tl.min(image, axis=0)
    y_image = (image - first_image).to(tl.int32)
    y_rows = (y_image * Ho + ho) * Wo + wo
    if PHASES == 4:
        y_rows = (y_image * 2 * Ho + 2 * ho + phase // 2) * (2 * Wo) + 2 * wo + phase % 2
    first_row = first_image * (Ho * Wo * PHASES)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    if SPLIT_K > 1:
        if is_last_to_arrive(sums[0], partial_ptr, counter_ptr, tile, tiles, split, SPLIT_K, BLOCK_M, BLOCK_N):
            for part in tl.static_range(PARTS):
                part_sums = total(partial_ptr, tile, tiles, part * WIDTH, ACC, SPLIT_K, BLOCK_M, BLOCK_N, WIDTH)
                _finish(
                    part_sums, None, image, h, w, first_row, y_rows, inside_m, first_n + part * WIDTH, phase, H, W, N, y_ptr,
                    scale_ptr, zero_point_ptr, None, None, weight_scale_ptr, border_sums_ptr, bias_ptr, has_bias, addend_ptr,
                    out_scale_ptr, out_zero_point_ptr, images_per_scale, 1, rows_per_addend, rows_per_out_scale, KERNEL, WIDTH,
                )  # fmt: skip
    else:
        parts = in_parts(sums[0], PARTS, BLOCK_M, BLOCK_N)
        parts_2 = parts
        if codes_2 is not None:
            sums_2 = _sums(
                codes_2, qweight, None, image, h, w, corner_h, corner_w, first_n, columns, inside_m, inside_n, H, W, N, C_2, C_all, C,
                phase, 0, KERNEL, TMA, ACC, EVEN_C, UNROLL, 1, BLOCK_M, BLOCK_N, 0, BLOCK_K,
            )  # fmt: skip
            parts_2 = in_parts(sums_2[0], PARTS, BLOCK_M, BLOCK_N)
        for part in tl.static_range(PARTS):
            _finish(
                parts[part], parts_2[part] if codes_2 is not None else None, image, h, w, first_row, y_rows, inside_m,
                first_n + part * WIDTH, phase, H, W, N, y_ptr,
                scale_ptr, zero_point_ptr, scale_2_ptr, zero_point_2_ptr, weight_scale_ptr, border_sums_ptr, bias_ptr, has_bias, addend_ptr,
                out_scale_ptr, out_zero_point_ptr, images_per_scale, images_per_scale_2, rows_per_addend, rows_per_out_scale, KERNEL, WIDTH,
            )  # fmt: skip
        if REST_N:
            _finish(
                sums[1], None, image, h, w, first_row, y_rows, inside_m, first_n + BLOCK_N, phase, H, W, N, y_ptr,
                scale_ptr, zero_point_ptr, None, None, weight_scale_ptr, border_sums_ptr, bias_ptr, has_bias, addend_ptr,
                out_scale_ptr, out_zero_point_ptr, images_per_scale, 1, rows_per_addend, rows_per_out_scale, KERNEL, REST_N,
            )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _conv2d_kernel(
    codes, codes_2, qweight, rest_weight, y_ptr,
    scale_ptr, zero_point_ptr, scale_2_ptr, zero_point_2_ptr, weight_scale_ptr, border_sums_ptr,
    bias_ptr, has_bias, addend_ptr, out_scale_ptr, out_zero_point_ptr, partial_ptr, counter_ptr,
    M, N, C, C_2, H, W, Ho, Wo, boxes_h, boxes_w, images_per_scale, images_per_scale_2, rows_per_addend, rows_per_out_scale,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, PHASES: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    TMA: tl.constexpr, ACC: tl.constexpr, EVEN_C: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr, PARTS: tl.constexpr,
    PERSISTENT: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """codes, codes_2 and qweight are pointers, or descriptors if TMA; codes_2 is None unless the channels have a second segment.
    rest_weight: qweight's descriptor for REST_N columns, which a tile has beyond BLOCK_N; None if REST_N is 0, as it is but for TMA with
    one segment and without SPLIT_K.

    M counts Ho * Wo pixels of all images, of each phase. PHASES 4 is the upsampler: phase 2 * p + q makes the output
    pixels (2 h + p, 2 w + q) from a 2x2 kernel that starts at (h + p - 1, w + q - 1); Ho and Wo are then the input's sides.
    """
    tiles_m = boxes_h * boxes_w * (M // (Ho * Wo)) if TMA else tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N + REST_N)
    # Without the loop where it is not needed: it costs 50 to 80 registers.
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), PHASES * tiles_m * tiles_n, tl.num_programs(0), flatten=True):
            _conv2d_tile(
                tile, tiles_m, tiles_n, codes, codes_2, qweight, rest_weight, y_ptr,
                scale_ptr, zero_point_ptr, scale_2_ptr, zero_point_2_ptr, weight_scale_ptr, border_sums_ptr,
                bias_ptr, has_bias, addend_ptr, out_scale_ptr, out_zero_point_ptr, partial_ptr, counter_ptr,
                M, N, C, C_2, H, W, Ho, Wo, boxes_h, boxes_w, images_per_scale, images_per_scale_2, rows_per_addend, rows_per_out_scale,
                KERNEL, STRIDE, PADDING, PHASES, BOX_H, BOX_W, TMA, ACC, EVEN_C, UNROLL, SPLIT_K, PARTS, GROUP_M,
                BLOCK_M, BLOCK_N, REST_N, BLOCK_K,
            )  # fmt: skip
    else:
        _conv2d_tile(
            tl.program_id(0), tiles_m, tiles_n, codes, codes_2, qweight, rest_weight, y_ptr,
            scale_ptr, zero_point_ptr, scale_2_ptr, zero_point_2_ptr, weight_scale_ptr, border_sums_ptr,
            bias_ptr, has_bias, addend_ptr, out_scale_ptr, out_zero_point_ptr, partial_ptr, counter_ptr,
            M, N, C, C_2, H, W, Ho, Wo, boxes_h, boxes_w, images_per_scale, images_per_scale_2, rows_per_addend, rows_per_out_scale,
            KERNEL, STRIDE, PADDING, PHASES, BOX_H, BOX_W, TMA, ACC, EVEN_C, UNROLL, SPLIT_K, PARTS, GROUP_M,
            BLOCK_M, BLOCK_N, REST_N, BLOCK_K,
        )  # fmt: skip
