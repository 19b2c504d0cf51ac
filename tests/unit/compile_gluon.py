"""Compiles the Gluon kernels as SDXL would launch them on Hopper, which need not be there, and prints what came out.

    python compile_gluon.py [--match EXPRESSION] [--json]

A program of its own, because Triton either interprets or compiles for the life of a process. Exit code 1 if a kernel spills,
lacks tensor core instructions, needs too much shared memory, or waits in every step for all of its products.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from compile_kernels import compile_launch, problem
from kernel_launches import Launch, Recorder

from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.design import GLUON, Design
from stepquant.kernels.gluon_ops import conv_kernel, conv_launch, geglu_kernel, gemm_kernel, launch
from stepquant.kernels.int8_gemm_many import LinearWeight
from stepquant.kernels.static_scale import StaticScale
from stepquant.kernels.tables import Product, load_table
from stepquant.kernels.triton_ops.scale_entries import ScaleEntries

SM = 90
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
KERNELS = {
    "_gluon_gemm_kernel": (gemm_kernel, launch),
    "_gluon_geglu_kernel": (geglu_kernel, launch),
    "_gluon_conv_kernel": (conv_kernel, conv_launch),
}
BATCH = 2


def launches() -> Iterator[tuple[str, str, Launch]]:
    """(label, dtype, launch) of what the table's rows need, with and without what may follow a product. Equal launches once."""
    seen: set[Launch] = set()
    for product, design in load_table(SM).rows.items():
        for what, call in _calls(product, design) if design.backend == GLUON else ():
            found = _recorded(call)
            if found not in seen:
                seen.add(found)
                yield f"{product.op} {product.M}x{product.N}x{product.K} {what} {design.label}", product.dtype, found


def _calls(product: Product, design: Design) -> Iterator[tuple[str, Callable[[], Any]]]:
    if product.op == "conv3x3":
        yield from _convolutions(product, design)
        return
    M, N, K, is_int8 = product.M, product.N, product.K, product.dtype == "int8"
    codes = CODES[product.dtype]
    with torch.device("meta"):
        zero_points, counters = torch.empty(64, dtype=torch.int32), torch.empty(2, dtype=torch.int32)
        layer = LinearWeight(torch.empty(N, K, dtype=codes), torch.empty(N), torch.empty(N, dtype=torch.int32), torch.empty(N).half())
        plain = QuantizedActivation(torch.empty(M, K, dtype=codes), torch.empty(M), None, 1)
        around = QuantizedActivation(plain.codes, torch.empty(2), counters if is_int8 else None, M // 2)
        addend = torch.empty(M, N).half()
        static = StaticScale(torch.empty(64), zero_points if is_int8 else None, torch.empty(2, dtype=torch.int64), counters)
        entries = ScaleEntries(torch.empty(2), counters if is_int8 else None, M // 2, (addend,) * 3, counters)
    if product.op == "geglu":
        yield "floats", lambda: launch.multiply_gated(plain, layer, torch.float16, None, None, design)
        yield "codes", lambda: launch.multiply_gated(around, layer, codes, static, entries, design)
    else:
        yield "plain", lambda: launch.multiply(plain, [layer], torch.float16, None, design)
        yield "addend", lambda: launch.multiply(around, [layer], torch.float16, addend, design)
        if N % (3 * design.columns) == 0:
            third = LinearWeight(*(tensor[: N // 3] for tensor in layer))
            yield "three", lambda: launch.multiply(plain, [third] * 3, torch.float16, None, design)


def _convolutions(product: Product, design: Design) -> Iterator[tuple[str, Callable[[], Any]]]:
    side, N, K = int((product.M / BATCH) ** 0.5), product.N, product.K
    codes, is_int8 = CODES[product.dtype], product.dtype == "int8"
    with torch.device("meta"):
        images = torch.empty(BATCH, side, side, K, dtype=codes)
        plain = QuantizedActivation(images, torch.empty(BATCH), None, side * side)
        around = QuantizedActivation(images, torch.empty(1), torch.empty(1, dtype=torch.int32) if is_int8 else None, product.M)
        weight = torch.empty(N, 3, 3, K, dtype=codes), torch.empty(N), torch.empty(16, N, dtype=torch.int32), torch.empty(N).half()
        addends = {"per image": torch.empty(BATCH, N).half(), "residual": torch.empty(product.M, N).half()}
    options = (1, (side, side), torch.float16, design)
    yield "plain", lambda: conv_launch.convolve(plain, *weight, None, *options)
    for name, addend in addends.items():
        yield name, lambda addend=addend: conv_launch.convolve(around, *weight, addend, *options)


def _recorded(call: Callable[[], Any]) -> Launch:
    recorders = [Recorder(getattr(module, name), module.RUNTIME_ONLY) for name, (module, _) in KERNELS.items()]
    with contextlib.ExitStack() as stack:
        for (name, (_, launcher)), recorder in zip(KERNELS.items(), recorders, strict=True):
            stack.enter_context(mock.patch.object(launcher, name, recorder))
        call()
    return next(found for recorder in recorders for found in recorder.launches)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="", help="compile only kernels whose label matches this expression")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON on stdout")
    options = parser.parse_args()
    reports = []
    for label, dtype, found in launches():
        if re.search(options.match, f"{dtype} {label}"):
            report = compile_launch(found, SM, dtype) | {"kernel": f"{dtype} {label}"}
            report["problem"] = problem(report) or ("" if report["in_flight"] else "waits for all products in every step")
            reports.append(report)
            sys.stderr.write(f"{report}\n")
    if options.json:
        sys.stdout.write(json.dumps(reports))
    return 1 if any(report["problem"] for report in reports) else 0


if __name__ == "__main__":
    raise SystemExit(main())
