"""Compiles the Triton kernels for GPUs that need not be there and prints what came out as JSON. Run by test_dispatch_compile.py.

A program of its own, because Triton either interprets or compiles for the life of a process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stepquant.kernels.triton_ops import int8_conv2d, int8_gemm, quantize_image, quantize_static, quantize_token
from stepquant.kernels.triton_ops.launch import unroll_factor
from stepquant.kernels.triton_ops.tiles import GROUP_M, Tile, conv_tile, gemm_tile

POINTERS = {
    "x_ptr": "*fp16", "codes_ptr": "*i8", "qweight_ptr": "*i8", "y_ptr": "*fp16", "scale_ptr": "*fp32", "absmax_ptr": "*fp32",
    "zero_point_ptr": "*i32", "weight_scale_ptr": "*fp32", "weight_sum_ptr": "*i32", "border_sums_ptr": "*i32", "bias_ptr": "*fp16",
}  # fmt: skip
MULTIPLES_OF_16 = ("M", "N", "K", "C", "P", "stride_am", "stride_wn", "stride_xm", "stride_xb", "stride_xp")


def compile_kernel(function: Any, sm: int, constants: dict[str, Any], num_warps: int, num_stages: int) -> dict[str, Any]:
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if name not in constants and (name in POINTERS or name in MULTIPLES_OF_16)]
    source = ASTSource(
        function,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    return {
        "kernel": function.__name__,
        "sm": sm,
        "int8_tensor_core": bool(re.search(r"(wgmma|mma)\S*\.s8\.s8", compiled.asm["ptx"])),
        **resources(compiled.asm["cubin"]),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and bytes of stack (spills), read with the cuobjdump that Triton brings."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    text = result.stdout + result.stderr
    return {name.lower(): int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK")}


def product_constants(tile: Tile, sm: int) -> dict[str, Any]:
    sizes = {"BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K, "GROUP_M": GROUP_M}
    return {"HAS_ZERO_POINT": True, "HAS_BIAS": True, "UNROLL": unroll_factor(sm), **sizes}


def compile_products(sm: int) -> list[dict[str, Any]]:
    gemm, conv = gemm_tile(sm, 8192, 640), conv_tile(sm, 8192, 640, 640)
    conv_constants = {"KERNEL": 3, "STRIDE": 1, "PADDING": 1, "EVEN_C": True} | product_constants(conv, sm)
    return [
        compile_kernel(int8_gemm._int8_gemm_kernel, sm, {"EVEN_K": True} | product_constants(gemm, sm), gemm.num_warps, gemm.num_stages),
        compile_kernel(int8_conv2d._int8_conv2d_kernel, sm, conv_constants, conv.num_warps, conv.num_stages),
    ]


def compile_quantizers(sm: int) -> list[dict[str, Any]]:
    tiny = quantize_token.TINY
    return [
        compile_kernel(quantize_token._quantize_token_kernel, sm, {"stride_xk": 1, "TINY": tiny, "BLOCK_M": 2, "BLOCK_K": 2048}, 4, 3),
        compile_kernel(
            quantize_static._quantize_static_kernel,
            sm,
            {"stride_xc": 1, "HAS_ZERO_POINT": True, "BLOCK_P": quantize_static.BLOCK_P, "BLOCK_C": quantize_static.BLOCK_C},
            4,
            3,
        ),
        compile_kernel(
            quantize_image._slice_absmax_kernel,
            sm,
            {"stride_xc": 1, "BLOCK_P": quantize_image.BLOCK_P, "BLOCK_C": quantize_image.BLOCK_C},
            4,
            3,
        ),
        compile_kernel(quantize_image._image_scale_kernel, sm, {"TINY": tiny, "BLOCK_SLICES": quantize_image.BLOCK_SLICES}, 1, 3),
    ]


if __name__ == "__main__":
    reports = [report for sm in (86, 90) for report in compile_products(sm)] + compile_quantizers(86)
    sys.stdout.write(json.dumps(reports))
