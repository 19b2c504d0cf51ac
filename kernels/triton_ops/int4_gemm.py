"""Kernel and launcher of int4_gemm. Formula: ../int4_gemm.py; nibbles: int4_unpack.py.

The product is computed as y^T = W x^T: as the first operand, unpacked weights go from registers into the tensor cores,
without a way back through shared memory (93 instructions a step instead of 171 on sm_8x with Triton 3.6).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..design import Design
from ..finish import Finish
from ..int4_gemm import check_int4_gemm
from ..int4_weight import CHANNELS_PER_BLOCK, GROUP_SIZE
from ..repeat import empty, launch
from ..tables import Product, tuned_design
from .accumulate import tile_position
from .epilogue import finish_tile, in_parts
from .gemm_kernel import scaled_sums
from .int4_unpack import unpack
from .int8_gemm import k_contiguous, optional_bias, register_limit
from .launch import can_describe, cdiv, compute_capability, describe, on_device

# Sizes whose value or divisibility must not make another compiled kernel: none of them is a stride.
RUNTIME_ONLY = ["M", "has_bias", "rows_per_scale", "rows_per_addend", "rows_per_out_scale"]
# Beyond it a tile is scaled and stored in halves or quarters; see int8_gemm.py.
MAX_SUMS_PER_THREAD = 16
INT8_SUMS, FLOAT_SUMS = tl.constexpr(tl.int32), tl.constexpr(tl.float32)


@triton.jit
def _operand(packed, words, x, HIGH: tl.constexpr, ASM: tl.constexpr):
    """One group's weights in the dtype of x."""
    codes = unpack(packed, words, HIGH, ASM)
    return codes if x.dtype == tl.int8 else codes.to(x.dtype)


@triton.jit
def _sums_from_pointers(
    x_ptr, w_ptr, group_scale_ptr, first_m, first_n, M, N, K, stride_xm, stride_wn,
    ACC: tl.constexpr, ASM: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_M) sums over K. EVEN_K: K is a multiple of 2 * GROUP."""
    ks = tl.arange(0, GROUP)
    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    inside_m = local_m < M - first_m
    inside_n = local_n < N - first_n
    x_ptrs = x_ptr + first_m * stride_xm + local_m[None, :] * stride_xm + ks[:, None]
    w_ptrs = w_ptr + first_n * stride_wn + local_n[:, None] * stride_wn + ks[None, :]
    word_ptrs = group_scale_ptr + first_n + local_n
    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    for k in tl.range(0, K, 2 * GROUP):
        packed = tl.load(w_ptrs, mask=inside_n[:, None], other=0)
        low = tl.load(x_ptrs, mask=inside_m[None, :], other=0.0)
        high = tl.load(x_ptrs + GROUP, mask=inside_m[None, :] if EVEN_K else inside_m[None, :] & (ks[:, None] < K - k - GROUP), other=0.0)
        words = tl.load(word_ptrs, mask=inside_n, other=0)
        acc = tl.dot(_operand(packed, words, low, False, ASM), low, acc, out_dtype=ACC)
        acc = tl.dot(_operand(packed, words, high, True, ASM), high, acc, out_dtype=ACC)
        word_ptrs += N
        x_ptrs += 2 * GROUP
        w_ptrs += GROUP
    return acc


@triton.jit
def _sums_from_descriptors(
    x, qweight, group_scale_ptr, first_m, first_n, N, K,
    ACC: tl.constexpr, ASM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As _sums_from_pointers. Beyond the edges of x and qweight zeros are read."""
    local_n = tl.arange(0, BLOCK_N)
    inside_n = local_n < N - first_n
    word_ptrs = group_scale_ptr + first_n + local_n
    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    for k in tl.range(0, K, 2 * GROUP):
        packed = qweight.load([first_n, k // 2])
        low = x.load([first_m, k]).T
        high = x.load([first_m, k + GROUP]).T
        words = tl.load(word_ptrs, mask=inside_n, other=0)
        acc = tl.dot(_operand(packed, words, low, False, ASM), low, acc, out_dtype=ACC)
        acc = tl.dot(_operand(packed, words, high, True, ASM), high, acc, out_dtype=ACC)
        word_ptrs += N
    return acc


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _int4_gemm_kernel(
    x, qweight, group_scale_ptr, y_ptr, scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr,
    bias_ptr, has_bias, addend_ptr, out_scale_ptr, out_zero_point_ptr,
    M, N, K, stride_xm, stride_wn, rows_per_scale, rows_per_addend, rows_per_out_scale,
    TMA: tl.constexpr, ACC: tl.constexpr, ASM: tl.constexpr, EVEN_K: tl.constexpr, PARTS: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One output tile. x (int8 codes, or floats without a scale) and qweight are pointers, or descriptors if TMA."""
    tile_m, tile_n = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    # 64 bit for the tile's corner only, as in gemm_kernel.py.
    first_m = tile_m.to(tl.int64) * BLOCK_M
    first_n = tile_n.to(tl.int64) * BLOCK_N
    if TMA:
        acc = _sums_from_descriptors(
            x, qweight, group_scale_ptr, first_m.to(tl.int32), first_n.to(tl.int32), N, K, ACC, ASM, BLOCK_M, BLOCK_N, GROUP
        )
    else:
        acc = _sums_from_pointers(
            x, qweight, group_scale_ptr, first_m, first_n, M, N, K, stride_xm, stride_wn, ACC, ASM, EVEN_K, BLOCK_M, BLOCK_N, GROUP
        )
    ROWS: tl.constexpr = BLOCK_M // PARTS
    parts = in_parts(acc, PARTS, BLOCK_N, BLOCK_M)
    local_m = tl.arange(0, ROWS)
    local_n = tl.arange(0, BLOCK_N)
    inside_n = local_n < N - first_n
    for part in tl.static_range(PARTS):
        row = first_m + part * ROWS
        inside_m = local_m < M - row
        sums = parts[part].T
        if scale_ptr is not None:
            y = scaled_sums(
                sums, scale_ptr, zero_point_ptr, weight_sum_ptr, 0, row + local_m, rows_per_scale, first_n + local_n, inside_m, inside_n
            )
        else:
            y = sums
        finish_tile(
            y, y_ptr, row, local_m, first_n, local_n, inside_m, inside_n, N, 0,
            weight_scale_ptr, bias_ptr, has_bias, addend_ptr, rows_per_addend, out_scale_ptr, out_zero_point_ptr, rows_per_out_scale,
        )  # fmt: skip


def int4_gemm(
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
    """See int4_gemm_ref; the integer sums are the same, the scaling may round differently. fp32 rows are rounded to fp16."""
    check_int4_gemm(activation, qweight, group_scale, weight_scale, weight_sum, bias)
    finish = Finish(addend, out_scale, out_zero_point)
    is_float = isinstance(activation, Tensor)
    x = k_contiguous(_16_bit(activation) if is_float else activation.codes)
    scales = (None, None, 1) if is_float else (activation.scale, activation.zero_point, activation.rows_per_scale)
    (M, K), N, sm = x.shape, qweight.shape[0], compute_capability(x.device)
    finish.check("int4_gemm", M, N)
    qweight = k_contiguous(qweight)
    design = _fitting(int4_design(x.dtype, M, N, K, sm), x, qweight, sm)
    y = empty((M, N), torch.int8 if finish.out_scale is not None else out_dtype, x.device)
    strides = (x.stride(0), qweight.stride(0))
    if design.tma:
        x_operand, w_operand = describe(x, [design.BLOCK_M, GROUP_SIZE]), describe(qweight, [design.BLOCK_N, GROUP_SIZE])
    else:
        x_operand, w_operand = x, qweight
    with on_device(y):
        launch(
            _int4_gemm_kernel, (cdiv(M, design.BLOCK_M) * cdiv(N, design.BLOCK_N),),
            x_operand, w_operand, group_scale, y, scales[0], scales[1], weight_scale, weight_sum if scales[1] is not None else None,
            *optional_bias(bias, y), finish.addend, finish.out_scale, finish.out_zero_point,
            M, N, K, *strides, scales[2], finish.rows_per(finish.addend, M), finish.rows_per(finish.out_scale, M),
            ACC=FLOAT_SUMS if is_float else INT8_SUMS, EVEN_K=K % CHANNELS_PER_BLOCK == 0, **_constants(design, sm, is_float),
        )  # fmt: skip
    return y if finish.out_scale is None else finish.activation(y, M)


def _16_bit(x: Tensor) -> Tensor:
    """Tensor cores have no fp32."""
    return x.half() if x.dtype is torch.float32 else x


# (sm // 10) -> designs for M > 256, M > 32 and below: BLOCK_N rows of the weight are the product's first operand.
_BY_GENERATION: dict[int, tuple[Design, Design, Design]] = {
    8: (Design(128, 128, 128, 8, 3), Design(64, 64, 128, 4, 3), Design(16, 64, 128, 4, 4)),
    9: (Design(128, 128, 128, 8, 3, tma=True), Design(64, 64, 128, 4, 4, tma=True), Design(16, 64, 128, 4, 4)),
}


def int4_design(dtype: torch.dtype, M: int, N: int, K: int, sm: int) -> Design:
    """The table's design for this product, or the default. Only int8 rows have a table."""
    tuned = tuned_design(sm, Product("gemm", "int4", 1, M, N, K)) if dtype is torch.int8 else None
    if tuned is not None:
        return tuned
    large, medium, small = _BY_GENERATION.get(sm // 10, _BY_GENERATION[8])
    if M <= 32:
        return small
    return medium if M <= 256 or N <= 64 else large


def _fitting(design: Design, x: Tensor, qweight: Tensor, sm: int) -> Design:
    """The design without what these operands cannot take. One program makes one whole tile, 128 channels a step."""
    tma = design.tma and x.dtype is torch.int8 and can_describe(x, sm) and can_describe(qweight, sm)
    return replace(design, BLOCK_K=CHANNELS_PER_BLOCK, tma=tma, split_k=1, persistent=False)


def _constants(design: Design, sm: int, is_float: bool) -> dict[str, int | bool]:
    """The kernel's constants and launch options that follow from the design."""
    return register_limit(design, sm, 1) | {
        "TMA": design.tma,
        # The instructions scale four weights by the first one's word: in the registers of a float operand these are of two rows.
        "ASM": sm > 0 and not is_float,
        "PARTS": min(4, -(-design.sums_per_thread // MAX_SUMS_PER_THREAD)),
        "GROUP_M": design.group_m,
        "BLOCK_M": design.BLOCK_M,
        "BLOCK_N": design.BLOCK_N,
        "GROUP": GROUP_SIZE,
        "num_warps": design.num_warps,
        "num_stages": design.num_stages,
    }
