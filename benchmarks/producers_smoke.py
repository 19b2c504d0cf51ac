"""One run on a GPU: checks every producer of int8 codes against float64 on SDXL's shapes and times it. No products, no whole UNet.

    python producers_smoke.py [--out results.jsonl]

Times are medians over CUDA graphs that hold the call for several sets of tensors, more in all than the L2 cache holds;
Python's launch time is left out. "copy" is a device-to-device copy measured the same way, the ceiling of the bytes a
producer must move. GroupNorm reads its input twice; the second reading may come from L2, and then it passes 100 %.
"before" is the same work in PyTorch operations and this package's quantize kernels. Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from stepquant.kernels import dispatch
from stepquant.kernels.describe import describe
from stepquant.kernels.dispatch import DynamicScale, QuantizedActivation, StaticScale

DEVICE = "cuda"
# Twice an H100's L2 cache of 50 MB: what a graph reads is not there from the round before.
ROTATED_BYTES = 100 * 2**20
MAX_SETS = 16
REPEATS = 25
# Half a step, and room for fp32 rounding and the GELU's 3e-5 of 127 steps.
STEPS_OFF = 0.51
# Calls a step at 1024x1024, CFG batch 2
LAYER_NORMS = {(2048, 1280): 180, (8192, 640): 30}  # M, K
GEGLUS = {(2048, 5120): 60, (8192, 2560): 10}  # M, N
GROUP_NORMS = {  # side, channels of the segments; with SiLU, before a 3x3 convolution
    (128, 320): 7, (64, 320): 1, (64, 640): 6, (32, 640): 1, (32, 1280): 10, (32, 1280, 1280): 2, (32, 1280, 640): 1,
    (64, 1280, 640): 1, (64, 640, 640): 1, (64, 640, 320): 1, (128, 640, 320): 1, (128, 320, 320): 2,
}  # fmt: skip
TRANSFORMER_NORMS = {(64, 640): 5, (32, 1280): 6}  # side, channels; no SiLU, before a Linear
ODD_ROWS = [(77, 333), (1, 64), (5, 1), (3, 8192)]
ODD_IMAGES = [(3, 5, 7, 32), (1, 1, 1, 96), (2, 33, 9, 64), (1, 67, 129, 40, 24)]  # B, H, W, channels of the segments

failures: list[str] = []


@dataclass(frozen=True)
class Case:
    """One op on one shape. make: a set of operands. run, before: the op and the same in separate steps. exact: float64 result."""

    op: str
    shape: tuple[int, ...]
    mode: str
    calls: int
    moved_bytes: int
    make: Callable[[], Any]
    run: Callable[[Any], QuantizedActivation]
    before: Callable[[Any], Any] | None
    exact: Callable[[Any], torch.Tensor]


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def graph_us(run: Callable[[Any], Any], sets: Sequence[Any]) -> list[float]:
    """p20, p50, p80 of one call in a CUDA graph of one call per set of operands."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for operands in sets[:2]:
            run(operands)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for operands in sets:
            run(operands)
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(sets))
    fifths = statistics.quantiles(times, n=5)
    return [fifths[0], statistics.median(times), fifths[-1]]


def copy_bytes_per_us() -> float:
    """Bytes read and written per microsecond by a copy of 256 MiB."""
    pair = torch.empty(2, 2**28, dtype=torch.int8, device=DEVICE)
    return 2**29 / graph_us(lambda _: pair[1].copy_(pair[0]), [None])[1]


def check(case: Case) -> str:
    """Codes against the float64 result, at most half a step off where they do not saturate."""
    operands = case.make()
    activation, exact = case.run(operands), case.exact(operands)
    steps = exact / activation.per_row(activation.scale).double().view(*exact.shape[:-1], 1)
    lowest, zero = -127, 0
    if activation.zero_point is not None:
        zero, lowest = activation.per_row(activation.zero_point).double().view(*exact.shape[:-1], 1), -128
    off = float(((steps + zero).clamp(lowest, 127) - activation.codes.double()).abs().max())
    if not off <= STEPS_OFF:
        failures.append(f"{case.op} {case.mode} {case.shape}: {off:.3f} steps off")
    return f"{off:.3f}" + ("" if off <= STEPS_OFF else " FAILED")


def measure(case: Case, copy_rate: float) -> dict[str, Any]:
    verdict = check(case)
    first = case.make()
    set_bytes = sum(tensor.nbytes for tensor in (first if isinstance(first, list) else [first]))
    sets = [first] + [case.make() for _ in range(min(MAX_SETS, ROTATED_BYTES // set_bytes + 1))]
    p20, p50, p80 = graph_us(case.run, sets)
    before = graph_us(case.before, sets)[1]
    rate = case.moved_bytes / p50
    record = {
        "op": case.op,
        "shape": "x".join(map(str, case.shape)),
        "scheme": case.mode,
        "backend": "triton",
        "baseline": "separate steps",
    }
    record |= {"p20_ms": p20 / 1e3, "p50_ms": p50 / 1e3, "p80_ms": p80 / 1e3, "baseline_p50_ms": before / 1e3}
    record |= {"bytes": case.moved_bytes, "share_of_copy": rate / copy_rate, "calls": case.calls}
    say(
        f"  {case.op:<25}{case.mode:<8}{record['shape']:>14} {verdict:>8} {p50:8.2f} {case.moved_bytes / copy_rate:8.2f} "
        f"{100 * rate / copy_rate:6.0f} {before:8.2f} {before / p50:6.2f} {case.calls:5} {case.calls * p50 / 1e3:8.3f}"
    )
    return record


def static_scale(lowest: float, highest: float, samples: int) -> StaticScale:
    scale = torch.linspace(1.0, 1.2, 64, device=DEVICE) * (highest - lowest) / 255
    zero_point = (-128 - lowest / scale).round().int()
    return StaticScale(scale, zero_point, torch.tensor([3, 60][:samples], device=DEVICE))


def layer_norm_case(shape: tuple[int, int], mode: str, calls: int) -> Case:
    M, K = shape
    weight, bias = 1 + 0.2 * torch.randn(K, device=DEVICE).half(), 0.1 * torch.randn(K, device=DEVICE).half()
    static = static_scale(-5, 5, 2 if M % 2 == 0 else 1) if mode == "static" else None

    def before(x: torch.Tensor) -> QuantizedActivation:
        y = functional.layer_norm(x, (K,), weight, bias)
        return dispatch.quantize_token(y) if static is None else dispatch.quantize_static(y, static.scale, static.zero_point, static.bucket)

    return Case(
        "layer_norm_quantize", shape, mode, calls, 3 * M * K,
        lambda: torch.randn(M, K, device=DEVICE).half(),
        lambda x: dispatch.layer_norm_quantize(x, weight, bias, 1e-5, static)[0],
        before,
        lambda x: functional.layer_norm(x.double(), (K,), weight.double(), bias.double()),
    )  # fmt: skip


def geglu_case(shape: tuple[int, int], mode: str, calls: int) -> Case:
    M, N = shape
    static = static_scale(-6, 6, 2 if M % 2 == 0 else 1) if mode == "static" else None

    def before(x: torch.Tensor) -> QuantizedActivation:
        value, gate = x.chunk(2, 1)
        y = value * functional.gelu(gate)
        return dispatch.quantize_token(y) if static is None else dispatch.quantize_static(y, static.scale, static.zero_point, static.bucket)

    def exact(x: torch.Tensor) -> torch.Tensor:
        value, gate = x.double().chunk(2, 1)
        return value * functional.gelu(gate)

    def make() -> torch.Tensor:
        return torch.randn(M, 2 * N, device=DEVICE).half()

    return Case("geglu_quantize", shape, mode, calls, 5 * M * N, make, lambda x: dispatch.geglu_quantize(x, static), before, exact)


def group_norm_case(B: int, H: int, W: int, widths: tuple[int, ...], mode: str, calls: int, silu: bool = True) -> Case:
    C = sum(widths)
    weight, bias = 1 + 0.2 * torch.randn(C, device=DEVICE).half(), 0.1 * torch.randn(C, device=DEVICE).half()
    static = (static_scale(-0.3 if silu else -5, 5, 2 if B % 2 == 0 else 1),) if mode == "static" else ()
    dynamic = DynamicScale.TOKEN if mode == "token" else DynamicScale.IMAGE

    def make() -> list[torch.Tensor]:
        return [torch.randn(B, c, H, W, device=DEVICE).half().contiguous(memory_format=torch.channels_last) for c in widths]

    def float_result(segments: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        x = torch.cat([segment.to(dtype) for segment in segments], 1)
        y = functional.group_norm(x, 32, weight.to(dtype), bias.to(dtype))
        return functional.silu(y) if silu else y

    def before(segments: list[torch.Tensor]) -> QuantizedActivation:
        y = float_result(segments, torch.float16)
        if static:
            return dispatch.quantize_static(y, static[0].scale, static[0].zero_point, static[0].bucket)
        return dispatch.quantize_token(y.permute(0, 2, 3, 1).reshape(-1, C)) if mode == "token" else dispatch.quantize_image(y)

    return Case(
        "group_norm_silu_quantize" if silu else "group_norm_quantize", (H, *widths), mode, calls, 5 * B * C * H * W, make,
        lambda segments: dispatch.group_norm_silu_quantize(segments, weight, bias, 1e-5, silu, static, dynamic)[0],
        before,
        lambda segments: float_result(segments, torch.float64).permute(0, 2, 3, 1),
    )  # fmt: skip


def sdxl_cases(mode: str) -> list[Case]:
    """mode: dynamic or static."""
    rows, pixels = ("static", "static") if mode == "static" else ("token", "image")
    return [
        *(layer_norm_case(shape, rows, calls) for shape, calls in LAYER_NORMS.items()),
        *(geglu_case(shape, rows, calls) for shape, calls in GEGLUS.items()),
        *(group_norm_case(2, side, side, tuple(widths), pixels, calls) for (side, *widths), calls in GROUP_NORMS.items()),
        *(group_norm_case(2, side, side, (C,), rows, calls, silu=False) for (side, C), calls in TRANSFORMER_NORMS.items()),
    ]


def check_odd_shapes() -> None:
    for mode in ("token", "static"):
        for shape in ODD_ROWS:
            check(layer_norm_case(shape, mode, 0))
            check(geglu_case(shape, mode, 0))
    for mode in ("image", "static"):
        for B, H, W, *widths in ODD_IMAGES:
            check(group_norm_case(B, H, W, tuple(widths), mode, 0))
    check(group_norm_case(2, 5, 7, (96,), "token", 0, silu=False))
    say(f"  odd shapes checked: {len(failures)} failed")


def context() -> dict[str, Any]:
    gpu = describe()["devices"][1]
    versions = {"torch": torch.__version__, "triton": describe()["triton"]}
    return {"gpu": gpu["name"], "sm": gpu["sm"], **versions, "seed": 0, "utc": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the records to this JSON-lines file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        say("No CUDA GPU here; this script checks and times GPU kernels. Run `pytest tests/unit` for the CPU.")
        return 1
    start = time.perf_counter()
    torch.manual_seed(0)
    if dispatch.choose_backend(DEVICE).backend is not dispatch.Backend.TRITON:
        failures.append(f"backend is {dispatch.choose_backend(DEVICE)}")
    check_odd_shapes()
    copy_rate = copy_bytes_per_us()
    say(f"  copy: {copy_rate / 1e6:.2f} TB/s; {time.perf_counter() - start:.0f} s")
    say(f"  {'op':<25}{'scale':<8}{'shape':>14} {'off':>8} {'us':>8} {'copy us':>8} {'%':>6} {'before':>8} {'x':>6} {'calls':>5} {'ms':>8}")
    records = []
    for mode in ("static", "dynamic"):
        chosen = [measure(case, copy_rate) for case in sdxl_cases(mode)]
        ours, before = (sum(record[key] * record["calls"] for record in chosen) for key in ("p50_ms", "baseline_p50_ms"))
        say(f"  all {mode} producers of a step: {ours:.2f} ms, separate steps {before:.2f} ms; {time.perf_counter() - start:.0f} s")
        records += chosen
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(context() | record) + "\n" for record in records)
    say(f"{time.perf_counter() - start:.0f} s, {len(failures)} failed" + "".join(f"\n  FAILED: {failure}" for failure in failures))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
