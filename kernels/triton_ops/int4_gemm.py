"""Kernel and launcher of int4_gemm on codes, and what the other int4 products share with it. Formula: ../int4_gemm.py.

Two ways, by the design: fused, which unpacks nibbles on their way into the tensor cores (int4_accumulate.py), or expanded,
which writes the int8 codes out first and leaves the product to int8_gemm. Rows that stay floats: int4_float_rows.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..design import EXPANDED, Design
from ..finish import Finish
from ..int4_gemm import check_int4_gemm
from ..int4_weight import CHANNELS_PER_BLOCK, GROUP_SIZE
from ..repeat import empty, launch
from ..tables import Product, tuned_design
from .accumulate import tile_position
from .epilogue import finish_tile, in_parts
from .gemm_kernel import scaled_sums
from .int4_accumulate import int4_sums_from_descriptors, int4_sums_from_pointers
from .int4_expand import expanded, expands
from .int4_float_rows import int4_float_rows
from .int8_gemm import k_contiguous, launch_gemm, optional_bias, register_limit
from .launch import can_describe, cdiv, compute_capability, describe, on_device

# Sizes whose value or divisibility must not make another compiled kernel: none of them is a stride.
RUNTIME_ONLY = ["M", "has_bias", "rows_per_scale", "rows_per_addend", "rows_per_out_scale"]
# Beyond it a tile is scaled and stored in halves or quarters; see int8_gemm.py.
MAX_SUMS_PER_THREAD = 16


@triton.jit
def finish_transposed(
    acc, first_m, first_n, M, N, y_ptr, scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, has_bias,
    addend_ptr, out_scale_ptr, out_zero_point_ptr, rows_per_scale, rows_per_addend, rows_per_out_scale,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scale and store acc (BLOCK_N, BLOCK_M) as rows from first_m on and columns from first_n on of y (M, N)."""
    ROWS: tl.constexpr = BLOCK_M // PARTS
    parts = in_parts(acc, PARTS, BLOCK_N, BLOCK_M)
    local_m = tl.arange(0, ROWS)
    local_n = tl.arange(0, BLOCK_N)
    inside_n = local_n < N - first_n
    for part in tl.static_range(PARTS):
        row = first_m + part * ROWS
        inside_m = local_m < M - row
        y = scaled_sums(
            parts[part].T,
            scale_ptr,
            zero_point_ptr,
            weight_sum_ptr,
            0,
            row + local_m,
            rows_per_scale,
            first_n + local_n,
            inside_m,
            inside_n,
        )
        finish_tile(
            y, y_ptr, row, local_m, first_n, local_n, inside_m, inside_n, N, 0,
            weight_scale_ptr, bias_ptr, has_bias, addend_ptr, rows_per_addend, out_scale_ptr, out_zero_point_ptr, rows_per_out_scale,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def _int4_gemm_kernel(
    codes, qweight, group_scale_ptr, y_ptr, scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr,
    bias_ptr, has_bias, addend_ptr, out_scale_ptr, out_zero_point_ptr,
    M, N, K, stride_xm, stride_wn, rows_per_scale, rows_per_addend, rows_per_out_scale,
    TMA: tl.constexpr, ASM: tl.constexpr, EVEN_K: tl.constexpr, PARTS: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One output tile. codes and qweight are pointers, or descriptors if TMA."""
    tile_m, tile_n = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    # 64 bit for the tile's corner only, as in gemm_kernel.py.
    first_m = tile_m.to(tl.int64) * BLOCK_M
    first_n = tile_n.to(tl.int64) * BLOCK_N
    if TMA:
        acc = int4_sums_from_descriptors(
            codes, qweight, group_scale_ptr, first_m.to(tl.int32), first_n.to(tl.int32), N, K, ASM, BLOCK_M, BLOCK_N, GROUP
        )
    else:
        local_n = tl.arange(0, BLOCK_N)
        acc = int4_sums_from_pointers(
            codes, qweight + first_n * stride_wn, group_scale_ptr + first_n, local_n, local_n < N - first_n, first_m, M, N, K,
            stride_xm, stride_wn, ASM, EVEN_K, BLOCK_M, BLOCK_N, GROUP,
        )  # fmt: skip
    finish_transposed(
        acc, first_m, first_n, M, N, y_ptr, scale_ptr, zero_point_ptr, weight_scale_ptr, weight_sum_ptr, bias_ptr, has_bias,
        addend_ptr, out_scale_ptr, out_zero_point_ptr, rows_per_scale, rows_per_addend, rows_per_out_scale, PARTS, BLOCK_M, BLOCK_N,
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
    """See int4_gemm_ref; the integer sums are the same, the scaling may round differently. Float rows: see int4_float_rows."""
    check_int4_gemm(activation, qweight, group_scale, weight_scale, weight_sum, bias)
    finish, is_float = Finish(addend, out_scale, out_zero_point), isinstance(activation, Tensor)
    finish.check("int4_gemm", activation.shape[0] if is_float else activation.rows, qweight.shape[0])
    qweight = k_contiguous(qweight)
    if is_float:
        return int4_float_rows(k_contiguous(activation), qweight, group_scale, weight_scale, bias, out_dtype, finish)
    return launch_int4_gemm(activation, qweight, group_scale, weight_scale, weight_sum, bias, out_dtype, finish)


def launch_int4_gemm(
    activation: QuantizedActivation,
    qweight: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    finish: Finish,
) -> Tensor | QuantizedActivation:
    """One product of operands that have been checked."""
    codes = k_contiguous(activation.codes)
    (M, K), N, sm = codes.shape, qweight.shape[0], compute_capability(codes.device)
    design = int4_design("gemm", M, N, K, sm)
    if design.backend == EXPANDED:
        (int8,) = expanded([qweight], [group_scale], K)
        return launch_gemm(activation, None, int8, weight_scale, weight_sum, bias, out_dtype, finish)
    design = fitting_int4(design, codes, qweight, sm)
    y = empty((M, N), torch.int8 if finish.out_scale is not None else out_dtype, codes.device)
    strides = (codes.stride(0), qweight.stride(0))
    if design.tma:
        codes, qweight = describe(codes, [design.BLOCK_M, GROUP_SIZE]), describe(qweight, [design.BLOCK_N, GROUP_SIZE])
    with on_device(y):
        launch(
            _int4_gemm_kernel, (cdiv(M, design.BLOCK_M) * cdiv(N, design.BLOCK_N),),
            codes, qweight, group_scale, y, activation.scale, activation.zero_point,
            weight_scale, weight_sum if activation.zero_point is not None else None,
            *optional_bias(bias, y), finish.addend, finish.out_scale, finish.out_zero_point,
            M, N, K, *strides, activation.rows_per_scale, finish.rows_per(finish.addend, M), finish.rows_per(finish.out_scale, M),
            TMA=design.tma, **int4_constants(design, K, sm),
        )  # fmt: skip
    return y if finish.out_scale is None else finish.activation(y, M)


# (sm // 10) -> designs for M > 256, M > 32 and below: BLOCK_N rows of the weight are the product's first operand.
_BY_GENERATION: dict[int, tuple[Design, Design, Design]] = {
    8: (Design(128, 128, 128, 8, 3), Design(64, 64, 128, 4, 3), Design(16, 64, 128, 4, 4)),
    9: (Design(128, 64, 128, 4, 3, tma=True), Design(64, 64, 128, 4, 4, tma=True), Design(16, 64, 128, 4, 4)),
}


def int4_design(op: str, M: int, N: int, K: int, sm: int) -> Design:
    """The table's design for this product ("gemm" or "geglu"), or the default."""
    tuned = tuned_design(sm, Product(op, "int4", 1, M, N, K))
    if tuned is not None:
        return tuned
    fused = default_int4_design(M, N, sm)
    return replace(fused, backend=EXPANDED) if expands(M, sm) else fused


def default_int4_design(M: int, N: int, sm: int) -> Design:
    """The fused design where no table says otherwise."""
    large, medium, small = _BY_GENERATION.get(sm // 10, _BY_GENERATION[8])
    if M <= 32:
        return small
    return medium if M <= 256 or N <= 64 else large


def fitting_int4(design: Design, codes: Tensor, qweight: Tensor, sm: int) -> Design:
    """The design without what these operands cannot take. One program makes one whole tile, 128 channels a step."""
    tma = design.tma and can_describe(codes, sm) and can_describe(qweight, sm)
    return replace(design, BLOCK_K=CHANNELS_PER_BLOCK, tma=tma, split_k=1, persistent=False)


def int4_constants(design: Design, K: int, sm: int) -> dict[str, int | bool]:
    """The fused kernels' constants and launch options that follow from the design."""
    return register_limit(design, sm, 1) | {
        "ASM": sm > 0,
        "EVEN_K": K % CHANNELS_PER_BLOCK == 0,
        "PARTS": min(4, -(-design.sums_per_thread // MAX_SUMS_PER_THREAD)),
        "GROUP_M": design.group_m,
        "BLOCK_M": design.BLOCK_M,
        "BLOCK_N": design.BLOCK_N,
        "GROUP": GROUP_SIZE,
        "num_warps": design.num_warps,
        "num_stages": design.num_stages,
    }
