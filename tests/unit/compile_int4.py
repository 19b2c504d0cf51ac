"""Compiles the products with 4-bit weights as SDXL would launch them, for GPUs that need not be there, and prints what came out.

    python compile_int4.py [--sm 80,86,89,90,120] [--match EXPRESSION] [--json]

A program of its own, because Triton either interprets or compiles for the life of a process. Exit code 1 if a kernel spills,
lacks tensor core instructions, shuffles bytes in its loop, or sends unpacked weights back through shared memory.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from compile_kernels import QUANTIZER, inspected, problem
from kernel_launches import POINTER_NAMES, Launch, Recorder
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.design import EXPANDED
from stepquant.kernels.static_scale import StaticScale
from stepquant.kernels.triton_ops import int4_expand, int4_float_rows, int4_geglu_gemm, int4_gemm, int4_gemm_many

# M, N, K: the deep and the upper level of SDXL, the prompt's keys, an embedding.
SHAPES = [(2048, 10240, 1280), (2048, 1280, 5120), (8192, 640, 640), (154, 1280, 2048), (2, 1280, 1280)]
# Of q, k and v, and of the projection to values and gates.
SELF_ATTENTION = [(2048, 1280, 1280), (8192, 640, 640)]
GATED = [(2048, 10240, 1280), (8192, 5120, 640)]
KERNELS = {
    "_int4_gemm_kernel": int4_gemm,
    "_int4_gemm_many_kernel": int4_gemm_many,
    "_int4_geglu_gemm_kernel": int4_geglu_gemm,
    "_expand_kernel": int4_expand,
    "_int4_few_rows_kernel": int4_float_rows,
}
MEMORY_BOUND = ("expand", "few rows")


def launches(sm: int) -> Iterator[tuple[str, Launch]]:
    """Integer rows with zero points and what follows, which take the most registers; the fused form of every product."""
    for M, N, K in SHAPES:
        addend = torch.empty(M, N, dtype=torch.float16, device="meta")
        yield f"gemm {M}x{N}x{K}", recorded("_int4_gemm_kernel", sm, int4_gemm.int4_gemm, rows(M, K), *weight(N, K), addend=addend)
    for M, N, K in SELF_ATTENTION:
        three = [weight(N, K)] * 3
        yield f"many {M}x{N}x{K}", recorded("_int4_gemm_many_kernel", sm, int4_gemm_many.int4_gemm_many, rows(M, K), three)
    for M, N, K in GATED:
        for label, static in (("", None), (" codes", tables())):
            call = int4_geglu_gemm.int4_geglu_gemm
            yield f"geglu {M}x{N}x{K}{label}", recorded("_int4_geglu_gemm_kernel", sm, call, rows(M, K), *weight(N, K), static=static)
    N, K = 1280, 1280
    yield "expand int8", recorded("_expand_kernel", sm, int4_expand.int4_expand, [weight(N, K)[0]] * 6, [weight(N, K)[1]] * 6, K)
    yield "expand fp16", recorded("_expand_kernel", sm, int4_expand.dequantized, *weight(N, K)[:3], K, torch.float16)
    x = torch.empty(2, K, dtype=torch.float16, device="meta")
    yield "few rows", recorded("_int4_few_rows_kernel", sm, int4_gemm.int4_gemm, x, *weight(N, K))


def rows(M: int, K: int) -> QuantizedActivation:
    with torch.device("meta"):
        return QuantizedActivation(torch.empty(M, K, dtype=torch.int8), torch.empty(2), torch.empty(2, dtype=torch.int32), M // 2)


def weight(N: int, K: int) -> tuple[torch.Tensor, ...]:
    with torch.device("meta"):
        packed = (torch.empty(N, K // 2, dtype=torch.uint8), torch.empty(K // 128, N, dtype=torch.int32), torch.empty(N))
        return *packed, torch.empty(N, dtype=torch.int32), torch.empty(N).half()


def tables() -> StaticScale:
    with torch.device("meta"):
        counters = torch.empty(2, dtype=torch.int32)
        return StaticScale(torch.empty(64), torch.empty(64, dtype=torch.int32), torch.empty(2, dtype=torch.int64), counters)


def recorded(kernel: str, sm: int, call: Callable[..., Any], *arguments: Any, **extras: Any) -> Launch:
    """What `call` launches. Designs that expand the weight are fused here: int8_gemm is compiled elsewhere."""
    module = KERNELS[kernel]
    recorder = Recorder(getattr(module, kernel), getattr(module, "RUNTIME_ONLY", []))
    chosen = int4_gemm.int4_design

    def fused(op: str, M: int, N: int, K: int, sm: int) -> Any:
        design = chosen(op, M, N, K, sm)
        return int4_gemm.default_int4_design(M, N, sm) if design.backend == EXPANDED else design

    patches = [mock.patch.object(module, kernel, recorder), mock.patch.dict(POINTER_NAMES, {torch.uint8: "*u8"})]
    for each in (int4_gemm, int4_gemm_many, int4_geglu_gemm, int4_expand):
        patches.append(mock.patch.object(each, "compute_capability", lambda _: sm))
        if hasattr(each, "int4_design"):
            patches.append(mock.patch.object(each, "int4_design", fused))
    for patch in patches:
        patch.start()
    try:
        call(*arguments, **extras)
    finally:
        for patch in patches:
            patch.stop()
    return recorder.launches[0]


def compiled_report(label: str, launch: Launch, sm: int) -> dict[str, Any]:
    function = getattr(KERNELS[launch.kernel], launch.kernel)
    names = function.arg_names
    source = ASTSource(
        function,
        dict(launch.signature),
        {(names.index(name),): value for name, value in launch.constants},
        {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=dict(launch.options))
    # With the weight as a register operand, the loop changes no layout.
    loop = re.search(r"scf\.for.*?scf\.yield", compiled.asm["ttgir"], re.DOTALL)
    stored = 0 if loop is None else len(re.findall(r"local_store|local_alloc %", loop.group())) + loop.group().count("ttg.convert_layout")
    return {"kernel": label, "sm": sm, "stored": stored, **inspected(compiled)}


def fault(report: dict[str, Any]) -> str:
    """What is wrong with a compiled kernel; empty if nothing."""
    is_product = not report["kernel"].startswith(MEMORY_BOUND)
    found = problem(report | {"dtype": "int8" if is_product else QUANTIZER})
    return found or ("unpacked weights go through shared memory" if report["stored"] and is_product else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", default="80,86,89,90,120", help="architectures, separated by commas")
    parser.add_argument("--match", default="", help="compile only kernels whose label matches this expression")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON on stdout")
    options = parser.parse_args()
    sys.stderr.write(f"Triton {triton.__version__}\n{'':7}{'kernel':<28} regs stack spill   mma  prmt stored instrs shared\n")
    reports = []
    for sm in map(int, options.sm.split(",")):
        for label, launch in launches(sm):
            if re.search(options.match, label):
                reports.append(compiled_report(label, launch, sm))
                names = ("registers", "stack", "spills", "mma", "prmt", "stored", "instructions", "shared")
                figures = "".join(f"{reports[-1][name]:>6}" for name in names)
                sys.stderr.write(f"sm_{sm:<4}{label:<28}{figures} {fault(reports[-1])}\n")
    if options.json:
        sys.stdout.write(json.dumps(reports))
    return 1 if any(map(fault, reports)) else 0


if __name__ == "__main__":
    raise SystemExit(main())
