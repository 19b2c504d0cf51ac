"""One run on a GPU: checks every kernel on SDXL's shapes and times it beside fp16. Single kernels only, no whole UNet.

    python kernels_smoke.py [--out results.jsonl]

Times are medians of triton.testing.do_bench (L2 flushed before each run); they leave out Python's launch time.
Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from stepquant.kernels import dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.describe import describe
from stepquant.kernels.int8_conv2d import int8_conv2d_ref
from stepquant.kernels.int8_gemm import int8_gemm_ref
from stepquant.kernels.quantize_image import quantize_image_ref
from stepquant.kernels.quantize_static import quantize_static_ref
from stepquant.kernels.quantize_token import quantize_token_ref

DEVICE = "cuda"
FP16_TOLERANCE = 5e-4  # relative norm to float64; rounding alone measures 2e-4
# M, N, K and how many a step at 1024x1024 with CFG has
LINEARS = {
    (2048, 10240, 1280): 60, (2048, 1280, 1280): 372, (2048, 1280, 5120): 60, (8192, 5120, 640): 10, (8192, 640, 640): 70,
    (8192, 640, 2560): 10, (154, 1280, 2048): 120, (2, 1280, 1280): 21,
}  # fmt: skip
# H = W of the input, Cin, Cout, stride
CONVS = {
    (32, 1280, 1280, 1): 10, (128, 320, 320, 1): 7, (64, 640, 640, 1): 6, (32, 2560, 1280, 1): 2, (64, 1280, 1280, 1): 1,
    (128, 640, 640, 1): 1, (128, 640, 320, 1): 2, (64, 1920, 640, 1): 1, (128, 960, 320, 1): 1, (128, 320, 320, 2): 1, (64, 640, 640, 2): 1,
}  # fmt: skip
# Shapes no layer of SDXL has, which a mask or an offset may get wrong
ODD_CONVS = [(3, 1, 4, 33, 8, 1), (2, 6, 1, 16, 70, 2), (1, 1, 1, 8, 8, 1), (2, 7, 9, 20, 24, 2)]  # B, H, W, Cin, Cout, stride

failures: list[str] = []


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def check(name: str, passed: bool) -> str:
    """'ok' or 'FAILED', and remembers the failure."""
    if not passed:
        failures.append(name)
    return "ok" if passed else "FAILED"


def microseconds(run: Callable[[], Any]) -> list[float]:
    """p20, p50, p80."""
    from triton.testing import do_bench

    return [1e3 * ms for ms in do_bench(run, warmup=5, rep=40, quantiles=[0.2, 0.5, 0.8])]


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def static_tables() -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.linspace(0.01, 0.05, 64, device=DEVICE)
    return scale, torch.linspace(-120, -60, 64, device=DEVICE).to(torch.int32)


def same(actual: QuantizedActivation, expected: QuantizedActivation) -> bool:
    scales_equal = torch.equal(actual.scale.nan_to_num(-1.0), expected.scale.nan_to_num(-1.0))
    return scales_equal and torch.equal(actual.codes, expected.codes)


def check_quantizers() -> None:
    """Codes and scales bit for bit against the reference on the same GPU, in every dtype and layout."""
    scale, zero_point = static_tables()
    buckets = torch.tensor([3, 60], device=DEVICE)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for M, K in ((2048, 1280), (8192, 640), (2048, 5120), (77, 333), (1, 64)):
            x = torch.randn(M, K, device=DEVICE).mul_(torch.randn(M, 1, device=DEVICE).exp()).to(dtype)
            x[0, 5], x[M // 2, 0] = float("nan"), 3e4
            passed = same(dispatch.quantize_token(x), quantize_token_ref(x))
            bucket = buckets if M % 2 == 0 else buckets[:1]
            for zero in (None, zero_point):
                passed &= same(dispatch.quantize_static(x, scale, zero, bucket), quantize_static_ref(x, scale, zero, bucket))
            say(f"  quantize token, static {(M, K)!s:>16} {dtype!s:<15} {check(f'quantize rows {M} {K} {dtype}', passed)}")
        for shape in ((2, 320, 128, 128), (2, 1280, 32, 32), (2, 20, 5, 7), (2, 33, 1, 4)):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=layout)
                passed = same(dispatch.quantize_image(x), quantize_image_ref(x))
                passed &= same(dispatch.quantize_static(x, scale, zero_point, buckets), quantize_static_ref(x, scale, zero_point, buckets))
                check(f"quantize images {shape} {dtype} {layout}", passed)
        say(f"  quantize image, static {dtype}: 4 shapes in NCHW and channels_last checked")


def product_checks(name: str, run: Callable[..., torch.Tensor], reference: Callable[..., torch.Tensor], arguments: dict, float64) -> str:
    """Integer sums bit for bit, then the layer with scales, zero points and bias against float64."""
    activation, N = arguments["activation"], arguments["weight_scale"].numel()
    unit = QuantizedActivation(activation.codes, torch.ones_like(activation.scale), None, activation.rows_per_scale)
    bare = arguments | {"activation": unit, "weight_scale": torch.ones(N, device=DEVICE), "bias": None, "out_dtype": torch.float32}
    expected = reference(**bare)
    exact = bool(expected.abs().max() < 2**24) and torch.equal(run(**bare), expected)
    expected = float64()  # of all rows, or of the last image
    error = relative_error(run(**arguments)[-len(expected) :], expected)
    return check(name, exact and error <= FP16_TOLERANCE) + f" {error:.0e}"


def row(record: dict[str, Any], quantize_us: float, operations: float, verdict: str) -> str:
    us, fp16_us = record["p50_ms"] * 1e3, record["baseline_p50_ms"] * 1e3
    return (
        f"  {record['shape']:>24} {verdict:>10} {us:8.1f} {operations / us / 1e6:7.0f} {quantize_us:8.1f} "
        f"{fp16_us:8.1f} {operations / fp16_us / 1e6:7.0f} {fp16_us / us:6.2f} {fp16_us / (us + quantize_us):6.2f}"
    )


def measure(op: str, shape: tuple[int, ...], run: Callable, quantize: Callable, fp16: Callable, operations: float, verdict: str) -> dict:
    p20, p50, p80 = microseconds(run)
    record = {"op": op, "shape": "x".join(map(str, shape)), "scheme": "w8a8", "backend": "triton", "baseline": "fp16 torch"}
    record |= {"p20_ms": p20 / 1e3, "p50_ms": p50 / 1e3, "p80_ms": p80 / 1e3, "tops": operations / p50 / 1e6}
    record["baseline_p50_ms"] = microseconds(fp16)[1] / 1e3
    say(row(record, microseconds(quantize)[1], operations, verdict))
    return record


def linear(shape: tuple[int, int, int]) -> dict[str, Any]:
    M, N, K = shape
    x, qweight = torch.randn(M, K, device=DEVICE).half(), codes(N, K)
    scale, zero_point = static_tables()
    activation = dispatch.quantize_static(x, scale, zero_point, torch.tensor([3, 60], device=DEVICE))
    arguments = {
        "activation": activation,
        "qweight": qweight,
        "weight_scale": torch.rand(N, device=DEVICE) * 1e-3,
        "weight_sum": qweight.sum(1, dtype=torch.int32),
        "bias": torch.randn(N, device=DEVICE).half(),
    }

    def float64() -> torch.Tensor:
        weight = qweight.double() * arguments["weight_scale"].double()[:, None]
        return activation.dequantize(torch.float64) @ weight.t() + arguments["bias"].double()

    verdict = product_checks(f"int8_gemm {shape}", dispatch.int8_gemm, int8_gemm_ref, arguments, float64)
    weight = torch.randn(N, K, device=DEVICE).half()
    return measure(
        "int8_gemm",
        shape,
        lambda: dispatch.int8_gemm(**arguments),
        lambda: dispatch.quantize_token(x),
        lambda: torch.nn.functional.linear(x, weight, arguments["bias"]),
        2.0 * M * N * K,
        verdict,
    )


def conv_arguments(x: torch.Tensor, Cout: int, stride: int) -> tuple[dict[str, Any], Callable[[], torch.Tensor]]:
    """Arguments of int8_conv2d for x (2 buckets, zero points), and the last image's float64 result."""
    B, Cin = x.shape[:2]
    scale, zero_point = static_tables()
    bucket = torch.tensor([3, 60] if B == 2 else [60], device=DEVICE)
    qweight = codes(Cout, 3, 3, Cin)
    arguments = {
        "activation": dispatch.quantize_static(x, scale, zero_point, bucket),
        "qweight": qweight,
        "weight_scale": torch.rand(Cout, device=DEVICE) * 1e-3,
        "border_sums": dispatch.border_sums(qweight),
        "bias": torch.randn(Cout, device=DEVICE).half(),
        "stride": stride,
    }

    def float64() -> torch.Tensor:
        weight = (qweight.double() * arguments["weight_scale"].double().view(-1, 1, 1, 1)).permute(0, 3, 1, 2)
        exact = arguments["activation"].dequantize(torch.float64)[-1:].permute(0, 3, 1, 2)
        with torch.backends.cudnn.flags(benchmark=False):  # trying every float64 algorithm would take minutes
            return torch.nn.functional.conv2d(exact, weight, arguments["bias"].double(), stride, 1)

    return arguments, float64


def conv(shape: tuple[int, int, int, int]) -> dict[str, Any]:
    side, Cin, Cout, stride = shape
    x = torch.randn(2, Cin, side, side, device=DEVICE).half().contiguous(memory_format=torch.channels_last)
    arguments, float64 = conv_arguments(x, Cout, stride)
    verdict = product_checks(f"int8_conv2d {shape}", dispatch.int8_conv2d, int8_conv2d_ref, arguments, float64)
    weight = torch.randn(Cout, Cin, 3, 3, device=DEVICE).half().contiguous(memory_format=torch.channels_last)
    return measure(
        "int8_conv2d",
        shape,
        lambda: dispatch.int8_conv2d(**arguments),
        lambda: dispatch.quantize_image(x),
        lambda: torch.nn.functional.conv2d(x, weight, arguments["bias"], stride, 1),
        2.0 * 2 * (side // stride) ** 2 * Cout * 9 * Cin,
        verdict,
    )


def check_odd_convs() -> None:
    for B, H, W, Cin, Cout, stride in ODD_CONVS:
        arguments, float64 = conv_arguments(torch.randn(B, Cin, H, W, device=DEVICE), Cout, stride)
        name = f"int8_conv2d {(B, H, W, Cin, Cout, stride)}"
        say(f"  {name:<44} {product_checks(name, dispatch.int8_conv2d, int8_conv2d_ref, arguments, float64)}")


def context() -> dict[str, Any]:
    gpu = describe()["devices"][1]
    return {
        "gpu": gpu["name"],
        "sm": gpu["sm"],
        "torch": torch.__version__,
        "triton": describe()["triton"],
        "seed": 0,
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the records to this JSON-lines file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        say("No CUDA GPU here; this script checks and times GPU kernels. Run `pytest tests/unit` for the CPU.")
        return 1
    start = time.perf_counter()
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    say(json.dumps(describe(), indent=1))
    check("backend is triton", dispatch.choose_backend("cuda").backend is dispatch.Backend.TRITON)
    check_quantizers()
    say(f"  {time.perf_counter() - start:.0f} s")
    header = f"  {'shape':>24} {'check':>10} {'us':>8} {'TOP/s':>7} {'quant us':>8} {'fp16 us':>8} {'TFLOP/s':>7} {'x':>6} {'x+q':>6}"
    say("int8_gemm, M x N x K; fp16 is cuBLAS; quant is quantize_token\n" + header)
    records = [linear(shape) for shape in LINEARS]
    say(f"int8_conv2d, side x Cin x Cout x stride; fp16 is cuDNN channels_last; quant is quantize_image\n{header}")
    records += [conv(shape) for shape in CONVS]
    check_odd_convs()
    for name, op, counts in (("Linears", "int8_gemm", LINEARS), ("3x3 convs", "int8_conv2d", CONVS)):
        chosen = [(r, n) for r, n in zip((r for r in records if r["op"] == op), counts.values(), strict=True)]
        ours, fp16 = (sum(r[key] * n for r, n in chosen) for key in ("p50_ms", "baseline_p50_ms"))
        say(f"  all {name} of a step: {ours:.2f} ms, fp16 {fp16:.2f} ms, {fp16 / ours:.2f} x (without quantizing)")
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(context() | record) + "\n" for record in records)
    say(f"{time.perf_counter() - start:.0f} s, {len(failures)} failed" + "".join(f"\n  FAILED: {name}" for name in failures))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
