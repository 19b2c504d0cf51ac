"""Launches the Gluon kernels for what they serve: one segment of K, 16-bit results or GEGLU's codes. Formulas: ../*.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..activation import QuantizedActivation
from ..design import Design
from ..int8_gemm_many import MAX_WEIGHTS, LinearWeight
from ..repeat import empty, launch
from ..static_scale import StaticScale
from ..triton_ops.launch import DESCRIPTOR_ALIGNMENT, can_describe, cdiv, compute_capability, multiprocessors, on_device
from ..triton_ops.scale_entries import ScaleEntries
from .geglu_kernel import _gluon_geglu_kernel
from .gemm_kernel import _gluon_gemm_kernel

ELEMENT = {torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv, torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
SUMS = {torch.int8: gl.int32, torch.float8_e4m3fn: gl.float32}
FLOATS = (torch.float16, torch.bfloat16)
# Parts that a tile's first BLOCK_N columns are stored in; as in the kernels.
PARTS = 2
# Bytes that a program can have if two are to run on a multiprocessor, and if one is; barriers and column vectors take 4 KiB.
SHARED_OF_TWO, SHARED_OF_ONE = 108 << 10, 222 << 10
# Of 65536: two programs of 8 warps run on a multiprocessor, one's epilogue under the other's products.
REGISTERS_OF_TWO = {"maxnreg": 128}


def serves(
    activation: QuantizedActivation, qweights: Sequence[Tensor], results: Sequence[Tensor | torch.dtype | None], row_bytes: int
) -> bool:
    """Whether the kernels take these: tensor descriptors can describe them and rows of row_bytes, floats and addends have 16 bits."""
    sm = compute_capability(activation.codes.device)
    dtypes = [result.dtype if isinstance(result, Tensor) else result for result in results if result is not None]
    described = all(can_describe(each, sm) for each in (activation.codes, *qweights)) and row_bytes % DESCRIPTOR_ALIGNMENT == 0
    return described and all(dtype in FLOATS for dtype in dtypes)


def multiply(
    activation: QuantizedActivation, layers: Sequence[LinearWeight], out_dtype: torch.dtype, addend: Tensor | None, design: Design
) -> Tensor:
    """(M, count * N) out_dtype: the products of int8_gemm or fp8_gemm, with one weight also an addend (M, N) of that dtype.

    With several weights, a tile's columns must divide each one's.
    """
    codes, (M, K), N, count = activation.codes, activation.codes.shape, layers[0].qweight.shape[0], len(layers)
    y = empty((M, count * N), out_dtype, codes.device)
    part_n, rest_n = design.BLOCK_N // PARTS, design.rest_n
    # The last one's in the places of those that are not there; no tile asks for them.
    repeated = [*layers, *[layers[-1]] * (MAX_WEIGHTS - count)]
    absent = [None] * (MAX_WEIGHTS - count)
    has_bias, has_zero_point = layers[0].bias is not None, activation.zero_point is not None
    with on_device(y):
        launch(
            _gluon_gemm_kernel, (cdiv(M, design.BLOCK_M) * count * cdiv(N, design.columns),),
            _describe(codes, design.BLOCK_M, design.BLOCK_K),
            *(_describe(layer.qweight, design.BLOCK_N, design.BLOCK_K) for layer in layers), *absent,
            *(_describe(layer.qweight, rest_n, design.BLOCK_K) for layer in layers), *absent,
            _describe(y, design.BLOCK_M, part_n), _describe(y, design.BLOCK_M, rest_n),
            _describe(addend, design.BLOCK_M, part_n), _describe(addend, design.BLOCK_M, rest_n),
            activation.scale, activation.zero_point, *(layer.weight_scale for layer in repeated),
            *(layer.weight_sum if has_zero_point else None for layer in repeated),
            *(layer.bias if has_bias else y for layer in repeated), int(has_bias),
            M, N, K, activation.rows_per_scale,
            WEIGHTS=count, EARLY=addend is not None and fits_early(design), REST_N=rest_n, **constants(design, codes.dtype),
        )  # fmt: skip
    return y


def multiply_gated(
    activation: QuantizedActivation, layer: LinearWeight, dtype: torch.dtype, static: StaticScale | None, entries: ScaleEntries | None,
    design: Design,
) -> Tensor:  # fmt: skip
    """(M, N) of int8_geglu_gemm or fp8_geglu_gemm: floats, or with `static` codes of `dtype`, whose scales are filled into `entries`.

    Its tiles have no rest, whatever the design says. One program runs on a multiprocessor, and num_warps are those of each of its two
    groups: registers are divided in the kernel.
    """
    codes, (M, K), N = activation.codes, activation.codes.shape, layer.qweight.shape[0] // 2
    y = empty((M, N), dtype, codes.device)
    coding = (None,) * 6
    if static is not None:
        coding = (static.scale, static.zero_point, static.bucket, entries.scale, entries.zero_point, static.clipped)
    tiles = cdiv(M, design.BLOCK_M) * cdiv(N, design.BLOCK_N // 2)
    with on_device(y):
        launch(
            _gluon_geglu_kernel, (min(tiles, multiprocessors(y.device)),),
            _describe(codes, design.BLOCK_M, design.BLOCK_K), _describe(layer.qweight, design.BLOCK_N // 2, design.BLOCK_K),
            _describe(y, design.BLOCK_M, design.BLOCK_N // 2),
            activation.scale, activation.zero_point, layer.weight_scale,
            layer.weight_sum if activation.zero_point is not None else None,
            y if layer.bias is None else layer.bias, int(layer.bias is not None), *coding,
            M, N, K, activation.rows_per_scale, 1 if entries is None else entries.rows_per_scale,
            **sizes(design, codes.dtype),
        )  # fmt: skip
    return y


def _describe(tensor: Tensor | None, rows: int, columns: int) -> TensorDescriptor | None:
    """A tensor descriptor whose copies are of (rows, columns); None if there are none."""
    if tensor is None or not rows or not columns:
        return None
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], ELEMENT[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns], layout)


def _ring_bytes(design: Design) -> int:
    return design.num_stages * (design.BLOCK_M + design.columns) * design.BLOCK_K


def fits_early(design: Design) -> bool:
    """Whether an addend can be copied before the products: its shared memory does not cost a multiprocessor its second program."""
    limit = SHARED_OF_TWO if _ring_bytes(design) <= SHARED_OF_TWO else SHARED_OF_ONE
    return _ring_bytes(design) + 2 * design.BLOCK_M * design.columns <= limit


def constants(design: Design, dtype: torch.dtype) -> dict[str, object]:
    limit = REGISTERS_OF_TWO if design.num_warps == 8 and _ring_bytes(design) <= SHARED_OF_TWO else {}
    return limit | sizes(design, dtype)


def sizes(design: Design, dtype: torch.dtype) -> dict[str, object]:
    return {
        "ACC": SUMS[dtype],
        "GROUP_M": design.group_m,
        "STAGES": design.num_stages,
        "BLOCK_M": design.BLOCK_M,
        "BLOCK_N": design.BLOCK_N,
        "BLOCK_K": design.BLOCK_K,
        "num_warps": design.num_warps,
    }
