"""Launcher of int8_gemm, and what fp8_gemm shares with it. Formula: ../int8_gemm.py; kernel: gemm_kernel.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..activation import QuantizedActivation
from ..design import GLUON, TRITON, Design, default_gemm_design
from ..finish import Finish
from ..int8_gemm import check_gemm
from ..int8_gemm_many import LinearWeight
from ..repeat import empty, launch
from ..tables import Product, tuned_design
from .gemm_kernel import _gemm_kernel
from .launch import can_describe, cdiv, compute_capability, describe, gluon, multiprocessors, on_device, unroll_factor
from .split_k import workspace

ACC = {torch.int8: tl.int32, torch.float8_e4m3fn: tl.float32}
DTYPE_NAME = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
# Beyond it a tile is scaled and stored in parts: 128 sums and all that the epilogue needs do not fit in 255 registers.
MAX_SUMS_PER_THREAD = 64
# With descriptors, whose loop needs few other registers, halves bring 64 sums below 128: two programs fit a multiprocessor.
MAX_SUMS_WITH_DESCRIPTORS = 32
# Of 65536: two programs of 8 warps run on a multiprocessor at a time, one's epilogue under the other's products. Left alone,
# the compiler takes up to 160 for what 128 hold, and halves the speed of ff2 on an H100.
REGISTERS_OF_TWO_PROGRAMS = 128
# Of a thread, as many as these registers hold beside all else: 128 x (128 + 32) in 8 warps, finished in quarters.
MAX_SUMS_OF_TWO_PROGRAMS = 80
PARTIAL_DTYPE = {torch.int8: torch.int32, torch.float8_e4m3fn: torch.float32}


def int8_gemm(
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
    """See int8_gemm_ref; the integer sums are the same, the scaling may round differently."""
    check_gemm(activation, qweight, weight_scale, weight_sum, bias, second)
    finish = Finish(addend, out_scale, out_zero_point)
    finish.check("int8_gemm", activation.rows, qweight.shape[0])
    return launch_gemm(activation, second, qweight, weight_scale, weight_sum, bias, out_dtype, finish)


def gemm_design(codes: Tensor, second: Tensor | None, N: int, sm: int) -> Design:
    """The table's design for this product, or the default."""
    M, K = codes.shape
    segments, K_all = (1, K) if second is None else (2, K + second.shape[1])
    tuned = tuned_design(sm, Product("gemm", DTYPE_NAME[codes.dtype], segments, M, N, K_all))
    return default_gemm_design(sm, M, N) if tuned is None else tuned


def launch_gemm(
    activation: QuantizedActivation,
    second: QuantizedActivation | None,
    qweight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    finish: Finish,
) -> Tensor | QuantizedActivation:
    """One launch of _gemm_kernel on operands that have been checked."""
    codes, codes_2 = k_contiguous(activation.codes), None if second is None else k_contiguous(second.codes)
    qweight = k_contiguous(qweight)
    (M, K), N, K_2 = codes.shape, qweight.shape[0], 0 if second is None else codes_2.shape[1]
    sm = compute_capability(codes.device)
    design = gemm_design(codes, codes_2, N, sm)
    if second is None and finish.out_scale is None and finish.rows_per(finish.addend, M) == 1:
        layer = LinearWeight(qweight, weight_scale, weight_sum, bias)
        if serves_gluon(design, activation, [qweight], (out_dtype, finish.addend), N * out_dtype.itemsize, sm):
            return gluon().multiply(activation, [layer], out_dtype, finish.addend, design)
    design = fitting(design, (codes, codes_2, qweight), sm)
    y = empty((M, N), torch.int8 if finish.out_scale is not None else out_dtype, codes.device)
    tiles = cdiv(M, design.BLOCK_M) * cdiv(N, design.BLOCK_N)
    partial, counter = split_workspace(design, tiles, codes)
    strides = (codes.stride(0), 0 if second is None else codes_2.stride(0), qweight.stride(0))
    rows_per = (activation.rows_per_scale, 1 if second is None else second.rows_per_scale)
    if design.tma:
        a_block = [design.BLOCK_M, design.BLOCK_K]
        codes, codes_2 = describe(codes, a_block), None if second is None else describe(codes_2, a_block)
        qweight = describe(qweight, [design.BLOCK_N, design.BLOCK_K])
    with on_device(y):
        launch(
            _gemm_kernel, program_grid(design, tiles, y.device),
            codes, codes_2, qweight, y,
            *segment_scales(activation, second), weight_scale, weight_sum,
            *optional_bias(bias, y), finish.addend, finish.out_scale, finish.out_zero_point, partial, counter,
            M, N, K, K_2, *strides, *rows_per, finish.rows_per(finish.addend, M), finish.rows_per(finish.out_scale, M),
            EVEN_K=divides_k(design, K, K_2), **design_constants(design, activation.codes.dtype, sm, 1 if second is None else 2),
        )  # fmt: skip
    return y if finish.out_scale is None else finish.activation(y, M)


def epilogue_parts(design: Design, segments: int = 1) -> int:
    """Parts of a tile that are scaled and stored one after the other; a split tile's sums are read back in parts too."""
    if design.tma:
        is_small = design.sums_per_thread * segments <= MAX_SUMS_WITH_DESCRIPTORS
    else:
        is_small = design.sums_per_thread <= MAX_SUMS_PER_THREAD
    if is_small:
        return 1
    return 4 if design.split_k > 1 else 2


def k_contiguous(matrix: Tensor) -> Tensor:
    """The matrix itself if its rows are contiguous, else a copy."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def serves_gluon(
    design: Design,
    activation: QuantizedActivation,
    qweights: list[Tensor],
    results: tuple[Tensor | torch.dtype | None, ...],
    row_bytes: int,
    sm: int,
) -> bool:
    """Whether the table asks for Gluon's kernels, this Triton has them, and they take these operands, results and addends."""
    asked = design.backend == GLUON and sm // 10 == 9 and gluon() is not None
    return asked and gluon().serves(activation, qweights, results, row_bytes)


def fitting(design: Design, operands: tuple[Tensor | None, ...], sm: int) -> Design:
    """The design without what these operands cannot take: descriptors of unaligned ones, split-K of two segments. Never Gluon's."""
    if design.backend == GLUON:
        # Triton's loop waits for its products in every step: two programs on a multiprocessor hide that, by these stages and warps.
        warps = max(design.num_warps, design.BLOCK_M * design.BLOCK_N // (32 * MAX_SUMS_PER_THREAD))
        design = replace(design, backend=TRITON, rest_n=0, tma=True, num_warps=warps, num_stages=min(design.num_stages, 3))
    if design.tma and not all(operand is None or can_describe(operand, sm) for operand in operands):
        design = replace(design, tma=False)
    if design.split_k > 1 and operands[1] is not None:
        design = replace(design, split_k=1)
    return design


def divides_k(design: Design, *sizes: int) -> bool:
    """Whether no step along K needs a mask; descriptors never do."""
    return design.tma or all(size % design.BLOCK_K == 0 for size in sizes)


def optional_bias(bias: Tensor | None, y: Tensor) -> tuple[Tensor, int]:
    """The kernels' bias_ptr and has_bias."""
    return (y, 0) if bias is None else (bias, 1)


def segment_scales(activation: QuantizedActivation, second: QuantizedActivation | None) -> tuple[Tensor | None, ...]:
    """The kernels' scale_ptr, zero_point_ptr, scale_2_ptr, zero_point_2_ptr."""
    own = (activation.scale, activation.zero_point)
    return (*own, None, None) if second is None else (*own, second.scale, second.zero_point)


def split_workspace(design: Design, tiles: int, codes: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The kernels' partial_ptr and counter_ptr."""
    if design.split_k == 1:
        return None, None
    return workspace(codes.device, design.split_k * tiles, tiles, design.BLOCK_M * design.BLOCK_N, PARTIAL_DTYPE[codes.dtype])


def program_grid(design: Design, tiles: int, device: torch.device) -> tuple[int, int]:
    """Programs to start: (tiles or as many as run at once, parts of K)."""
    return (min(tiles, multiprocessors(device)) if design.persistent else tiles), design.split_k


def register_limit(design: Design, sm: int, segments: int) -> dict[str, int]:
    """Triton's option that keeps two programs on a Hopper multiprocessor, where their sums leave room for all else."""
    fits = design.num_warps == 8 and design.sums_per_thread * segments <= MAX_SUMS_OF_TWO_PROGRAMS
    return {"maxnreg": REGISTERS_OF_TWO_PROGRAMS} if sm // 10 == 9 and design.tma and fits and not design.persistent else {}


def design_constants(design: Design, dtype: torch.dtype, sm: int, segments: int = 1) -> dict[str, Any]:
    """The kernels' constants and launch options that follow from the design."""
    return register_limit(design, sm, segments) | {
        "TMA": design.tma,
        "ACC": ACC[dtype],
        "UNROLL": unroll_factor(sm),
        "SPLIT_K": design.split_k,
        "PARTS": epilogue_parts(design, segments),
        "PERSISTENT": design.persistent,
        "GROUP_M": design.group_m,
        "BLOCK_M": design.BLOCK_M,
        "BLOCK_N": design.BLOCK_N,
        "BLOCK_K": design.BLOCK_K,
        "num_warps": design.num_warps,
        "num_stages": design.num_stages,
    }
