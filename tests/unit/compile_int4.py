"""Compiles int4_gemm as SDXL would launch it, for GPUs that need not be there, and prints what came out.

    python compile_int4.py [--sm 80,86,89,90,120] [--match EXPRESSION] [--json]

A program of its own, because Triton either interprets or compiles for the life of a process. Exit code 1 if a kernel spills,
lacks tensor core instructions, shuffles bytes in its loop, or sends unpacked weights back through shared memory.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any
from unittest import mock

import torch
import triton
from compile_kernels import inspected, problem
from kernel_launches import POINTER_NAMES, Launch, Recorder
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.triton_ops import int4_gemm as gemm

# M, N, K: the deep and the upper level of SDXL, the prompt's keys, an embedding.
SHAPES = [(2048, 10240, 1280), (2048, 1280, 5120), (8192, 640, 640), (154, 1280, 2048), (2, 1280, 1280)]


def launches(sm: int) -> list[tuple[str, Launch]]:
    """Integer rows with zero point and residual, which take the most registers, and float ones."""
    with torch.device("meta"), mock.patch.object(gemm, "compute_capability", lambda _: sm):
        return [(label, launch) for shape in SHAPES for label, launch in (integer(*shape), floating(*shape))]


def integer(M: int, N: int, K: int) -> tuple[str, Launch]:
    rows = QuantizedActivation(torch.empty(M, K, dtype=torch.int8), torch.empty(2), torch.empty(2, dtype=torch.int32), M // 2)
    return f"int8 {M}x{N}x{K}", record(rows, N, K, addend=torch.empty(M, N).half())


def floating(M: int, N: int, K: int) -> tuple[str, Launch]:
    return f"fp16 {M}x{N}x{K}", record(torch.empty(M, K).half(), N, K)


def record(rows: Any, N: int, K: int, **extras: torch.Tensor) -> Launch:
    recorder = Recorder(gemm._int4_gemm_kernel, gemm.RUNTIME_ONLY)
    weight = (torch.empty(N, K // 2, dtype=torch.uint8), torch.empty(K // 128, N, dtype=torch.int32), torch.empty(N))
    with mock.patch.object(gemm, "_int4_gemm_kernel", recorder), mock.patch.dict(POINTER_NAMES, {torch.uint8: "*u8"}):
        gemm.int4_gemm(rows, *weight, torch.empty(N, dtype=torch.int32), torch.empty(N).half(), **extras)
    return recorder.launches[0]


def compiled_report(label: str, launch: Launch, sm: int) -> dict[str, Any]:
    names = gemm._int4_gemm_kernel.arg_names
    source = ASTSource(
        gemm._int4_gemm_kernel,
        dict(launch.signature),
        {(names.index(name),): value for name, value in launch.constants},
        {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=dict(launch.options))
    # With the weight as a register operand, the loop changes no layout.
    loop = re.search(r"scf\.for.*?scf\.yield", compiled.asm["ttgir"], re.DOTALL).group()
    stored = len(re.findall(r"local_store|local_alloc %", loop)) + loop.count("ttg.convert_layout")
    # The two halves of a block, and no third dot: what the loop is checked for.
    return {"kernel": label, "sm": sm, "dtype": label.split()[0], "stored": stored, **inspected(compiled)}


def fault(report: dict[str, Any]) -> str:
    """What is wrong with a compiled kernel; empty if nothing."""
    found = problem(report | {"dtype": "int8" if report["dtype"] == "int8" else "fp16"})
    return found or ("unpacked weights go through shared memory" if report["stored"] and report["dtype"] == "int8" else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", default="80,86,89,90,120", help="architectures, separated by commas")
    parser.add_argument("--match", default="", help="compile only kernels whose label matches this expression")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON on stdout")
    options = parser.parse_args()
    sys.stderr.write(f"Triton {triton.__version__}\n{'':7}{'kernel':<24} regs stack spill   mma  prmt stored instrs shared\n")
    reports = []
    for sm in map(int, options.sm.split(",")):
        for label, launch in launches(sm):
            if re.search(options.match, label):
                reports.append(compiled_report(label, launch, sm))
                names = ("registers", "stack", "spills", "mma", "prmt", "stored", "instructions", "shared")
                figures = "".join(f"{reports[-1][name]:>6}" for name in names)
                sys.stderr.write(f"sm_{sm:<4}{label:<24}{figures} {fault(reports[-1])}\n")
    if options.json:
        sys.stdout.write(json.dumps(reports))
    return 1 if any(map(fault, reports)) else 0


if __name__ == "__main__":
    raise SystemExit(main())
