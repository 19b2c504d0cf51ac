"""Compiles the channel group and attention kernels as SDXL would launch them, for GPUs that need not be there, and prints what came out.

    python compile_channel_groups.py [--sm 80,86,89,90,120] [--match EXPRESSION] [--json]

A program of its own, because Triton either interprets or compiles for the life of a process. Exit code 1 if a kernel spills,
lacks tensor core instructions or shuffles bytes in its loop.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import sys
from typing import Any
from unittest import mock

import torch
import triton
from compile_kernels import inspected, problem
from kernel_launches import Launch, Recorder
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.channel_group import ChannelGroups
from stepquant.kernels.static_scale import StaticScale
from stepquant.kernels.triton_ops import channel_group_conv2d as conv
from stepquant.kernels.triton_ops import channel_group_gemm as gemm
from stepquant.kernels.triton_ops import log2_attention as attention
from stepquant.kernels.triton_ops import quantize_channel_group as quantize

# M, N, K, granularity
LINEARS = [(2048, 1280, 1280, 64), (2048, 10240, 1280, 64), (2048, 1280, 5120, 64), (8192, 640, 640, 64), (2048, 1280, 5120, 128)]
# side, Cin, Cout, stride
CONVS = [(32, 1280, 1280, 1), (128, 320, 320, 1), (64, 640, 640, 2)]


def groups(K: int, granularity: int) -> ChannelGroups:
    """Two groups on the meta device."""
    order, factor, table = torch.empty(K, dtype=torch.int32), torch.empty(K), torch.empty(2, dtype=torch.int32)
    return ChannelGroups(order, factor, factor, table, table, ((0, granularity, 3), (granularity, K, 0)), granularity)


def activation(codes: torch.Tensor, rows: int) -> QuantizedActivation:
    return QuantizedActivation(codes, torch.empty(2), torch.empty(2, dtype=torch.int32), rows // 2)


def launches(sm: int) -> list[tuple[str, Any, Launch]]:
    """(label, kernel, launch) of every case; zero points everywhere, which take the most registers."""
    with contextlib.ExitStack() as stack, torch.device("meta"):
        for module in (gemm, conv):
            stack.enter_context(mock.patch.object(module, "compute_capability", lambda _: sm))
        linears, convolutions = [linear(*shape) for shape in LINEARS], [convolution(*shape) for shape in CONVS]
        return [*itertools.chain(*linears, *convolutions), *quantizers(), *attentions()]


def linear(M: int, N: int, K: int, granularity: int) -> list[tuple[str, Any, Launch]]:
    codes, qweight = torch.empty(M, K, dtype=torch.int8), torch.empty(N, K, dtype=torch.int8)
    sums = torch.empty(N, dtype=torch.int32)
    arguments = (activation(codes, M), groups(K, granularity), qweight, torch.empty(N), sums, torch.empty(N).half())
    label = f"gemm {M}x{N}x{K} granularity {granularity}"
    return record(label, gemm, "_channel_group_gemm_kernel", lambda: gemm.channel_group_gemm(*arguments))


def convolution(side: int, Cin: int, Cout: int, stride: int) -> list[tuple[str, Any, Launch]]:
    codes, qweight = torch.empty(2, side, side, Cin, dtype=torch.int8), torch.empty(Cout, 3, 3, Cin, dtype=torch.int8)
    sums = torch.empty(16, Cout, dtype=torch.int32)
    arguments = (activation(codes, 2 * side * side), groups(Cin, 64), qweight, torch.empty(Cout), sums, torch.empty(Cout).half(), stride)
    label = f"conv {Cin}>{Cout} @{side} stride {stride}"
    return record(label, conv, "_channel_group_conv2d_kernel", lambda: conv.channel_group_conv2d(*arguments))


def quantizers() -> list[tuple[str, Any, Launch]]:
    rows, image = torch.empty(2048, 1280).half(), torch.empty(2, 320, 128, 128).half()
    counters = torch.empty(2, dtype=torch.int32)
    static = StaticScale(torch.empty(64), torch.empty(64, dtype=torch.int32), torch.empty(2, dtype=torch.int64), counters)
    store, absmax = "_quantize_channel_group_kernel", "_grouped_slice_absmax_kernel"
    row = "_quantize_channel_group_row_kernel"
    found = record("quantize token", quantize, row, lambda: quantize.quantize_channel_group(rows, groups(1280, 64)))
    found += record("quantize static", quantize, row, lambda: quantize.quantize_channel_group(rows, groups(1280, 64), static))

    def quantize_image() -> None:
        quantize.quantize_channel_group(image, groups(320, 64))

    with contextlib.ExitStack() as stack:
        for kernel in ("_image_scale_kernel", store, absmax):
            stack.enter_context(mock.patch.object(quantize, kernel, Recorder(getattr(quantize, kernel), [])))
        quantize_image()
        for label, kernel in (("quantize image NCHW", store), ("absmax image NCHW", absmax)):
            recorder = getattr(quantize, kernel)
            found += [(label, recorder.function, launch) for launch in recorder.launches]
    return found


def attentions() -> list[tuple[str, Any, Launch]]:
    """SDXL's self-attention at the deep level, and cross-attention with its start token."""
    q, text, start = torch.empty(2, 20, 1024, 64).half(), torch.empty(2, 20, 77, 64).half(), torch.empty(2, 77, dtype=torch.bool)
    names = ("_row_totals_kernel", "_log2_attention_kernel", "_int8_attention_kernel")
    with contextlib.ExitStack() as stack:
        recorders = {name: Recorder(getattr(attention, name), []) for name in names}
        for name, recorder in recorders.items():
            stack.enter_context(mock.patch.object(attention, name, recorder))
        attention.log2_attention(q, q, q, 8)
        attention.log2_attention(q, text, text, 8, start)
        attention.int8_attention(q, q, q)
    found = []
    for name, recorder in recorders.items():
        for launch in recorder.launches:
            absent = dict(launch.constants).get("start_ptr", "") is None
            found.append((f"attention {name.strip('_').removesuffix('_kernel')}{' self' if absent else ''}", recorder.function, launch))
    return found


def record(label: str, module: Any, kernel: str, call: Any) -> list[tuple[str, Any, Launch]]:
    function = getattr(module, kernel)
    recorder = Recorder(function, getattr(module, "RUNTIME_ONLY", []))
    with mock.patch.object(module, kernel, recorder):
        call()
    return [(label, function, launch) for launch in recorder.launches]


def compiled_report(label: str, function: Any, launch: Launch, sm: int) -> dict[str, Any]:
    names = function.arg_names
    source = ASTSource(
        function,
        dict(launch.signature),
        {(names.index(name),): value for name, value in launch.constants},
        {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=dict(launch.options))
    return {"kernel": label, "sm": sm, "dtype": "int8" if label.startswith(("gemm", "conv")) else "fp16", **inspected(compiled)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", default="80,86,89,90,120", help="architectures, separated by commas")
    parser.add_argument("--match", default="", help="compile only kernels whose label matches this expression")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON on stdout")
    options = parser.parse_args()
    sys.stderr.write(f"Triton {triton.__version__}\n{'':7}{'kernel':<44} regs stack spill   mma  prmt instrs shared\n")
    reports = []
    for sm in map(int, options.sm.split(",")):
        for label, function, launch in launches(sm):
            if re.search(options.match, label):
                report = compiled_report(label, function, launch, sm)
                reports.append(report)
                names = ("registers", "stack", "spills", "mma", "prmt", "instructions", "shared")
                figures = "".join(f"{report[name]:>6}" for name in names)
                sys.stderr.write(f"sm_{sm:<4}{label:<44}{figures} {problem(report)}\n")
    if options.json:
        sys.stdout.write(json.dumps(reports))
    return 1 if any(problem(report) for report in reports) else 0


if __name__ == "__main__":
    raise SystemExit(main())
