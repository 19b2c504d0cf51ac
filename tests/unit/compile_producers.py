"""Compiles every kernel that writes codes from a norm, a gate or attention to the prompt, for any GPU, and prints what came out.

    python compile_producers.py [--sm 80,86,89,90,120] [--match EXPRESSION] [--json]

A program of its own, because Triton either interprets or compiles for the life of a process. Exit code 1 if a kernel spills.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from typing import Any

import triton
from compile_kernels import inspected
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stepquant.kernels.quantize_token import TINY
from stepquant.kernels.triton_ops import (
    attention,
    geglu_quantize,
    group_norm_silu_quantize,
    group_norm_statistics,
    layer_norm_quantize,
    quantize_joined,
    quantize_wide,
)
from stepquant.kernels.triton_ops.row_parts import neighbours, row_warps, split_row

POINTERS = {
    "x_ptr": "*fp16", "weight_ptr": "*fp16", "bias_ptr": "*fp16", "codes_ptr": "*i8", "float_ptr": "*fp16", "scale_ptr": "*fp32",
    "zero_point_ptr": "*i32", "table_ptr": "*fp32", "zero_table_ptr": "*i32", "bucket_ptr": "*i64", "moments_ptr": "*fp32",
    "first_ptr": "*fp16", "second_ptr": "*fp16", "affine_ptr": "*fp32", "absmax_ptr": "*fp32", "clipped_ptr": "*i32",
    "high_ptr": "*i8", "low_ptr": "*i8", "high_scale_ptr": "*fp32", "low_scale_ptr": "*fp32",
    "q_ptr": "*fp16", "k_ptr": "*fp16", "v_ptr": "*fp16", "y_ptr": "*i8",
}  # fmt: skip
# What SDXL's shapes make multiples of 16, which Triton then knows.
MULTIPLES_OF_16 = ("M", "N", "K", "C", "P", "C_total", "channel_offset", "seam", "rows_per_scale", "stride_xm", "stride_xb", "stride_xp",
                   "stride_cm", "stride_moment", "stride_affine", "pixels_per_slice", "clipped_rows",
                   "stride_first_b", "stride_first_p", "stride_second_b", "stride_second_p",
                   "stride_qb", "stride_qt", "stride_kb", "stride_ks")  # fmt: skip
FLOATS = ("eps", "factor")


@dataclass(frozen=True)
class Case:
    """One kernel as SDXL launches it."""

    label: str
    function: Any
    constants: dict[str, Any]
    num_warps: int


def row_case(label: str, function: Any, length: int, **constants: Any) -> Case:
    head, tail = split_row(length)
    vector = {"VECTOR": neighbours(length)} if "VECTOR" in function.arg_names else {}
    return Case(f"{label} {length}", function, constants | {"TINY": TINY, "HEAD": head, "TAIL": tail} | vector, row_warps(length))


def joined_case(label: str, first: int, second: int) -> Case:
    parts = zip(("FIRST_HEAD", "FIRST_TAIL", "SECOND_HEAD", "SECOND_TAIL"), (*split_row(first), *split_row(second)), strict=True)
    constants = dict(parts) | {"TINY": TINY, "EVEN": True, "VECTOR": quantize_joined.vector_of(first, second)}
    return Case(f"{label} {first}+{second}", quantize_joined._joined_token_kernel, constants, row_warps(first + second))


def attention_case(label: str, keys: int, **constants: Any) -> Case:
    kernel, sizes = attention._kernel_for(keys, limits_registers=False)
    constants |= sizes | {"D": 64, "BLOCK_M": attention.BLOCK_M}
    return Case(f"{label} {keys}", kernel, constants, attention.NUM_WARPS)


def cases() -> list[Case]:
    layer_norm, geglu = layer_norm_quantize._layer_norm_quantize_kernel, geglu_quantize._geglu_quantize_kernel
    norm, statistics = group_norm_silu_quantize, group_norm_statistics
    tile = {"BLOCK_P": norm.BLOCK_P, "BLOCK_C": norm.BLOCK_C, "TINY": TINY, "SILU": True, "ABSMAX": 64, "ABSMAX_STRIDE": 64}
    image = {"stride_xc": 1}
    token = {"STATIC": False, "HAS_ZERO_POINT": False, "clipped_ptr": None}
    static = {"STATIC": True, "HAS_ZERO_POINT": True}  # with counters, as ComfyUI's host has them
    apply = norm._normalize_quantize_kernel
    groups = {"SILU": True, "BOUND": True, "LARGEST": False, "BLOCK_SLICES": statistics.FEW_SLICES}
    moments = {"stride_xc": 1, "MANY": False, "STEPS": statistics.STEPS, "BLOCK_P": statistics.BLOCK_P, "BLOCK_C": statistics.BLOCK_C}
    wide = {"TINY": TINY, "BLOCK_ABSMAX": quantize_wide.BLOCK_ABSMAX, "BLOCK_P": quantize_wide.BLOCK_P, "BLOCK_C": quantize_wide.BLOCK_C}
    joined = {"HAS_ZERO_POINT": True, "BLOCK_P": quantize_joined.BLOCK_P, "BLOCK_C": quantize_joined.BLOCK_C}
    return [
        Case("joined static", quantize_joined._joined_static_kernel, joined | {"EVEN": True}, 4),
        Case("joined static, uneven", quantize_joined._joined_static_kernel, joined | {"EVEN": False}, 4),
        joined_case("joined token", 640, 320),
        joined_case("joined token", 1280, 1280),
        row_case("layer norm token", layer_norm, 1280, BLOCK_M=1, EVEN=True, KEEP_FLOAT=False, **token),
        row_case("layer norm token", layer_norm, 1279, BLOCK_M=1, EVEN=False, KEEP_FLOAT=False, **token),
        row_case("layer norm static, floats too", layer_norm, 1280, BLOCK_M=1, EVEN=True, KEEP_FLOAT=True, **static),
        row_case("layer norm token", layer_norm, 640, BLOCK_M=1, EVEN=True, KEEP_FLOAT=False, **token),
        row_case("geglu token", geglu, 5120, BLOCK_M=1, **token),
        row_case("geglu static", geglu, 5120, BLOCK_M=1, **static),
        row_case("geglu token", geglu, 2560, BLOCK_M=1, **token),
        Case("group norm moments", statistics._channel_moments_kernel, moments | {"BOUND": False, "EVEN": True}, 4),
        Case("group norm moments and ends", statistics._channel_moments_kernel, moments | {"BOUND": True, "EVEN": True}, 4),
        Case("group norm moments, uneven", statistics._channel_moments_kernel, moments | {"BOUND": True, "EVEN": False, "MANY": True}, 4),
        Case("group norm affine 2560", statistics._group_affine_kernel, groups | {"BLOCK_G": 128}, 4),
        Case("group norm affine above the dip", statistics._group_affine_kernel, groups | {"LARGEST": True, "BLOCK_G": 128}, 4),
        Case("group norm affine 640", statistics._group_affine_kernel, groups | {"BLOCK_G": 32, "BLOCK_SLICES": statistics.MAX_SLICES}, 4),
        Case("group norm silu image", apply, tile | token | image, norm.NUM_WARPS),
        Case("group norm silu image above the dip", apply, tile | token | image | {"HAS_ZERO_POINT": True}, norm.NUM_WARPS),
        Case("group norm silu static", apply, tile | static | image, norm.NUM_WARPS),
        Case("group norm silu static NCHW", apply, tile | static | {"stride_xp": 1}, norm.NUM_WARPS),
        Case("wide rows", quantize_wide._wide_rows_kernel, {"TINY": TINY, "BLOCK_K": quantize_wide.BLOCK_K}, 4),
        Case("wide image", quantize_wide._wide_pixels_kernel, wide | image | {"affine_ptr": None, "SILU": False}, quantize_wide.NUM_WARPS),
        Case("wide group norm silu", quantize_wide._wide_pixels_kernel, wide | image | {"SILU": True}, quantize_wide.NUM_WARPS),
        attention_case("attention", 77, **(token | {"EVEN_T": True})),
        attention_case("attention static", 77, **static, EVEN_T=True),
        attention_case("attention static, uneven", 160, **static, EVEN_T=False),
        attention_case("attention", 1024, **(token | {"EVEN_T": True})),
        attention_case("attention static", 1024, **static, EVEN_T=True),
        row_case("group norm token", norm._normalize_quantize_token_kernel, 1280, SILU=False, EVEN=True),
    ]


def compile_case(case: Case, sm: int) -> dict[str, Any]:
    names, constants = case.function.arg_names, case.constants
    types = {name: POINTERS.get(name, "fp32" if name in FLOATS else "i32") for name in names}
    aligned = [name for name in names if name not in constants and (name in POINTERS or name in MULTIPLES_OF_16)]
    source = ASTSource(
        case.function,
        {name: "constexpr" if name in constants else types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": case.num_warps})
    return {"kernel": case.label, "sm": sm, **inspected(compiled)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", default="80,86,89,90,120", help="architectures, separated by commas")
    parser.add_argument("--match", default="", help="compile only kernels whose label matches this expression")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON on stdout")
    options = parser.parse_args()
    sys.stderr.write(f"Triton {triton.__version__}\n{'':7}{'kernel':<40} regs stack spill instrs shared\n")
    reports = []
    for sm in options.sm.split(","):
        for case in (case for case in cases() if re.search(options.match, case.label)):
            report = compile_case(case, int(sm))
            reports.append(report)
            figures = "".join(f"{report[name]:>6}" for name in ("registers", "stack", "spills", "instructions", "shared"))
            sys.stderr.write(f"sm_{sm:<4}{case.label:<40}{figures}\n")
    if options.json:
        sys.stdout.write(json.dumps(reports))
    return 1 if any(report["stack"] or report["spills"] for report in reports) else 0


if __name__ == "__main__":
    raise SystemExit(main())
