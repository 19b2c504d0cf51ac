"""Compiles every kernel that SDXL's products need, for GPUs that need not be there, and prints what came out.

    python compile_kernels.py [--sm 80,86,89,90,120] [--dtype fp16,int8,fp8] [--json] [--sample N] [--match EXPRESSION]

A program of its own, because Triton either interprets or compiles for the life of a process. Exit code 1 if a kernel
spills, lacks tensor core instructions or shuffles bytes in its loop (Triton 3.8/3.9 on sm_8x without unrolling).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import triton
from kernel_launches import Launch, launches, quantizer_launches
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from stepquant.kernels.backend import FP8_MIN_SM
from stepquant.kernels.gluon_ops import conv_kernel as gluon_conv
from stepquant.kernels.gluon_ops import geglu_kernel as gluon_geglu
from stepquant.kernels.gluon_ops import gemm_kernel as gluon_gemm
from stepquant.kernels.sdxl_products import PRODUCTS
from stepquant.kernels.triton_ops import (
    conv_kernel,
    gemm_kernel,
    int8_geglu_gemm,
    quantize_image,
    quantize_static,
    quantize_token,
)

MODULES = (
    gemm_kernel, conv_kernel, int8_geglu_gemm, quantize_token, quantize_static, quantize_image, gluon_gemm, gluon_geglu, gluon_conv,
)  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
QUANTIZER = "fp16"  # in the place of a product's dtype
# Shared memory that a program can have, in bytes.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
# Byte shuffles per tensor core instruction in a healthy int8 loop; the regression has one or more for each.
MAX_SHUFFLES_PER_MMA = 0.5


def compile_launch(launch: Launch, sm: int, dtype: str) -> dict[str, Any]:
    function = next(getattr(module, launch.kernel) for module in MODULES if hasattr(module, launch.kernel))
    names = function.arg_names
    source = (GluonASTSource if function.is_gluon() else ASTSource)(
        function,
        dict(launch.signature),
        {(names.index(name),): value for name, value in launch.constants},
        {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=dict(launch.options))
    return {"kernel": launch.label, "sm": sm, "dtype": dtype, **inspected(compiled), "seconds": round(time.perf_counter() - start, 2)}


def inspected(compiled: Any) -> dict[str, Any]:
    """Registers, stack bytes, spill instructions, tensor core instructions, byte shuffles and shared memory of the machine code.

    in_flight: products that Hopper's loop does not wait for in each step.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([str(TOOLS / "cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
        code = subprocess.run([str(TOOLS / "nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    text = usage.stdout + usage.stderr
    count = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("LDL", "STL", "PRMT")}
    return {
        "registers": int(re.search(r"REG:(\d+)", text).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", text).group(1)),
        "spills": count["LDL"] + count["STL"],
        "mma": len(re.findall(r"\b(?:IMMA|IGMMA|QMMA|QGMMA|OMMA)\b", code)),
        "prmt": count["PRMT"],
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", code, re.MULTILINE)),
        "shared": compiled.metadata.shared,
        "in_flight": max(map(int, re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", compiled.asm["ptx"])), default=0),
    }


def problem(report: dict[str, Any]) -> str:
    """What is wrong with a compiled kernel; empty if nothing."""
    if "error" in report:
        return report["error"]
    if report["stack"] or report["spills"]:
        return f"spills ({report['stack']} bytes of stack, {report['spills']} instructions)"
    if report["shared"] > SHARED_LIMIT.get(report["sm"], SHARED_LIMIT[86]):
        return f"{report['shared']} bytes of shared memory"
    if report["dtype"] == QUANTIZER:
        return ""
    if not report["mma"]:
        return "no tensor core instruction"
    if report["sm"] // 10 == 8 and report["prmt"] > MAX_SHUFFLES_PER_MMA * report["mma"] + 32:
        return f"{report['prmt']} byte shuffles for {report['mma']} tensor core instructions"
    return ""


def reports(sms: list[int], dtypes: list[str], sample: int, match: str) -> list[dict[str, Any]]:
    found = []
    for sm in sms:
        for dtype in dtypes:
            if dtype == "fp8" and sm < FP8_MIN_SM:
                continue
            needed = quantizer_launches() if dtype == QUANTIZER else list(launches(list(PRODUCTS), sm, dtype))
            for launch in [launch for launch in needed if re.search(match, launch.label)][::sample]:
                try:
                    report = compile_launch(launch, sm, dtype)
                except Exception as error:  # compilers raise whatever they like; here it is the result
                    said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                    report = {"kernel": launch.label, "sm": sm, "dtype": dtype, "error": said}
                found.append(report)
                sys.stderr.write(row(found[-1]) + "\n")
    return found


def row(report: dict[str, Any]) -> str:
    if "error" in report:
        return f"sm_{report['sm']:<4}{report['dtype']:<5}{report['kernel']:<86} {report['error']}"
    return (
        f"sm_{report['sm']:<4}{report['dtype']:<5}{report['kernel']:<86}{report['registers']:>5}{report['stack']:>6}{report['spills']:>6}"
        f"{report['mma']:>5}{report['prmt']:>6}{report['instructions']:>7}{report['shared']:>8}{report['seconds']:>6.1f} {problem(report)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", default="80,86,89,90,120", help="architectures, separated by commas")
    parser.add_argument("--dtype", default="fp16,int8,fp8", help="of the codes; fp16 stands for the kernels that make them")
    parser.add_argument("--sample", type=int, default=1, help="compile every n-th kernel only")
    parser.add_argument("--match", default="", help="compile only kernels whose label matches this expression")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON on stdout")
    options = parser.parse_args()
    sys.stderr.write(f"Triton {triton.__version__}\n{'':9}{'kernel':<86} regs stack spill  mma  prmt instrs  shared  secs\n")
    found = reports([int(sm) for sm in options.sm.split(",")], options.dtype.split(","), options.sample, options.match)
    if options.json:
        sys.stdout.write(json.dumps(found))
    failed = [report for report in found if problem(report)]
    sys.stderr.write(f"{len(found)} kernels, {len(failed)} failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
