"""Triton kernel of int8_gemm and fp8_gemm: one program makes one output tile, a part of it (split-K), or many (persistent)."""

import triton
import triton.language as tl

from .accumulate import gemm_from_descriptors, gemm_from_pointers, tile_position
from .epilogue import finish_tile, in_parts, load_rows
from .split_k import is_last_to_arrive, total

# Sizes whose value or divisibility must not make another compiled kernel: none of them is a stride.
RUNTIME_ONLY = ["M", "has_bias", "rows_per_scale", "rows_per_scale_2", "rows_per_addend", "rows_per_out_scale"]


@triton.jit
def _sums(
    codes, qweight, first_m, first_n, local_m, local_n, inside_m, inside_n, K, w_offset, split, stride_am, stride_wn,
    TMA: tl.constexpr, ACC: tl.constexpr, EVEN_K: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of one segment of K, or of this program's part of it: (BLOCK_M, BLOCK_N) ACC."""
    k_first = 0
    k_last = K
    if SPLIT_K > 1:
        part = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
        k_first = split * part
        k_last = tl.minimum(K, k_first + part)
    if TMA:
        acc = gemm_from_descriptors(
            codes, qweight, first_m.to(tl.int32), first_n.to(tl.int32), w_offset, k_first, k_last, ACC, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        acc = gemm_from_pointers(
            codes + first_m * stride_am, qweight + first_n * stride_wn + w_offset, local_m, local_n, inside_m, inside_n,
            K, k_first, k_last, stride_am, stride_wn, ACC, EVEN_K, UNROLL, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return acc


@triton.jit
def scaled_sums(acc, scale_ptr, zero_point_ptr, weight_sum_ptr, sum_offset, rows, rows_per_scale, columns, inside_m, inside_n):
    """scale[m] * (acc - zero_point[m] * weight_sum[n]), fp32."""
    entry = rows.to(tl.int32) // rows_per_scale  # there are fewer than 2^31 rows, and a 64 bit division takes four times as long
    if zero_point_ptr is not None:
        weight_sum = tl.load(weight_sum_ptr + sum_offset + columns, mask=inside_n, other=0)
        acc -= load_rows(zero_point_ptr, entry, inside_m, 0)[:, None] * weight_sum[None, :]
    return acc.to(tl.float32) * load_rows(scale_ptr, entry, inside_m, 0.0)[:, None]


@triton.jit
def finish_columns(
    acc, acc_2, first_m, first_n, M, N, y_ptr,
    scale_ptr, zero_point_ptr, scale_2_ptr, zero_point_2_ptr, weight_scale_ptr, weight_sum_ptr,
    bias_ptr, has_bias, addend_ptr, out_scale_ptr, out_zero_point_ptr,
    rows_per_scale, rows_per_scale_2, rows_per_addend, rows_per_out_scale,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Scale and store WIDTH columns from first_n on; acc_2 are the second segment's sums, or None."""
    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, WIDTH)
    inside_m = local_m < M - first_m
    inside_n = local_n < N - first_n
    rows = first_m + local_m
    columns = first_n + local_n
    y = scaled_sums(acc, scale_ptr, zero_point_ptr, weight_sum_ptr, 0, rows, rows_per_scale, columns, inside_m, inside_n)
    if acc_2 is not None:
        y += scaled_sums(acc_2, scale_2_ptr, zero_point_2_ptr, weight_sum_ptr, N, rows, rows_per_scale_2, columns, inside_m, inside_n)
    finish_tile(
        y, y_ptr, first_m, local_m, first_n, local_n, inside_m, inside_n, N, 0,
        weight_scale_ptr, bias_ptr, has_bias, addend_ptr, rows_per_addend, out_scale_ptr, out_zero_point_ptr, rows_per_out_scale,
    )  # fmt: skip


@triton.jit
def _gemm_tile(
    tile, tiles_m, tiles_n, codes, codes_2, qweight, y_ptr,
    scale_ptr, zero_point_ptr, scale_2_ptr, zero_point_2_ptr, weight_scale_ptr, weight_sum_ptr,
    bias_ptr, has_bias, addend_ptr, out_scale_ptr, out_zero_point_ptr, partial_ptr, counter_ptr,
    M, N, K, K_2, stride_am, stride_am_2, stride_wn, rows_per_scale, rows_per_scale_2, rows_per_addend, rows_per_out_scale,
    TMA: tl.constexpr, ACC: tl.constexpr, EVEN_K: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr, PARTS: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
    # 64 bit for the tile's corner only: offsets within a tile fit 32 bit, and a batch may pass 2^31 elements.
    first_m = tile_m.to(tl.int64) * BLOCK_M
    first_n = tile_n.to(tl.int64) * BLOCK_N
    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    inside_m = local_m < M - first_m
    inside_n = local_n < N - first_n
    split = tl.program_id(1)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    acc = _sums(
        codes, qweight, first_m, first_n, local_m, local_n, inside_m, inside_n, K, 0, split, stride_am, stride_wn,
        TMA, ACC, EVEN_K, UNROLL, SPLIT_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if SPLIT_K > 1:
        tiles = tiles_m * tiles_n
        if is_last_to_arrive(acc, partial_ptr, counter_ptr, tile, tiles, split, SPLIT_K, BLOCK_M, BLOCK_N):
            for part in tl.static_range(PARTS):
                sums = total(partial_ptr, tile, tiles, part * WIDTH, ACC, SPLIT_K, BLOCK_M, BLOCK_N, WIDTH)
                finish_columns(
                    sums, None, first_m, first_n + part * WIDTH, M, N, y_ptr,
                    scale_ptr, zero_point_ptr, None, None, weight_scale_ptr, weight_sum_ptr, bias_ptr, has_bias, addend_ptr,
                    out_scale_ptr, out_zero_point_ptr, rows_per_scale, 1, rows_per_addend, rows_per_out_scale, BLOCK_M, WIDTH,
                )  # fmt: skip
    else:
        acc_2 = None
        if codes_2 is not None:
            acc_2 = _sums(
                codes_2, qweight, first_m, first_n, local_m, local_n, inside_m, inside_n, K_2, K, 0, stride_am_2, stride_wn,
                TMA, ACC, EVEN_K, UNROLL, 1, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        parts = in_parts(acc, PARTS, BLOCK_M, BLOCK_N)
        parts_2 = parts
        if codes_2 is not None:
            parts_2 = in_parts(acc_2, PARTS, BLOCK_M, BLOCK_N)
        for part in tl.static_range(PARTS):
            finish_columns(
                parts[part], parts_2[part] if codes_2 is not None else None, first_m, first_n + part * WIDTH, M, N, y_ptr,
                scale_ptr, zero_point_ptr, scale_2_ptr, zero_point_2_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, has_bias, addend_ptr,
                out_scale_ptr, out_zero_point_ptr, rows_per_scale, rows_per_scale_2, rows_per_addend, rows_per_out_scale, BLOCK_M, WIDTH,
            )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _gemm_kernel(
    codes, codes_2, qweight, y_ptr,
    scale_ptr, zero_point_ptr, scale_2_ptr, zero_point_2_ptr, weight_scale_ptr, weight_sum_ptr,
    bias_ptr, has_bias, addend_ptr, out_scale_ptr, out_zero_point_ptr, partial_ptr, counter_ptr,
    M, N, K, K_2, stride_am, stride_am_2, stride_wn, rows_per_scale, rows_per_scale_2, rows_per_addend, rows_per_out_scale,
    TMA: tl.constexpr, ACC: tl.constexpr, EVEN_K: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr, PARTS: tl.constexpr,
    PERSISTENT: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """codes, codes_2 and qweight are pointers, or descriptors if TMA; codes_2 is None unless K has a second segment."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # Without the loop where it is not needed: it costs 50 to 80 registers.
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
            _gemm_tile(
                tile, tiles_m, tiles_n, codes, codes_2, qweight, y_ptr,
                scale_ptr, zero_point_ptr, scale_2_ptr, zero_point_2_ptr, weight_scale_ptr, weight_sum_ptr,
                bias_ptr, has_bias, addend_ptr, out_scale_ptr, out_zero_point_ptr, partial_ptr, counter_ptr,
                M, N, K, K_2, stride_am, stride_am_2, stride_wn, rows_per_scale, rows_per_scale_2, rows_per_addend, rows_per_out_scale,
                TMA, ACC, EVEN_K, UNROLL, SPLIT_K, PARTS, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        _gemm_tile(
            tl.program_id(0), tiles_m, tiles_n, codes, codes_2, qweight, y_ptr,
            scale_ptr, zero_point_ptr, scale_2_ptr, zero_point_2_ptr, weight_scale_ptr, weight_sum_ptr,
            bias_ptr, has_bias, addend_ptr, out_scale_ptr, out_zero_point_ptr, partial_ptr, counter_ptr,
            M, N, K, K_2, stride_am, stride_am_2, stride_wn, rows_per_scale, rows_per_scale_2, rows_per_addend, rows_per_out_scale,
            TMA, ACC, EVEN_K, UNROLL, SPLIT_K, PARTS, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
