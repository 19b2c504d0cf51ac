"""Time and error of layers with 16-bit codes (token16) beside 8-bit codes and fp16, producers included, for SDXL's shapes on a GPU.

    python benchmarks/wide_codes.py [--seconds 60]

JSON lines are appended to benchmarks/results/wide_codes.jsonl. Convolutions: GroupNorm, SiLU, quantization and product, against our
GroupNorm and SiLU in fp16 and PyTorch's convolution. Linears and 1x1: quantization and product, against PyTorch's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from stepquant.hosts import compute, fused
from stepquant.kernels import dispatch
from stepquant.kernels.sdxl_products import BATCH, PRODUCTS, SdxlProduct
from stepquant.quant.scheme import TOKEN16, Scheme
from stepquant.quant.sqnr import sqnr_db
from stepquant.quant.weight import quantize_weight
from stepquant.version import VERSION

OUT = Path(__file__).parent / "results" / "wide_codes.jsonl"
ROLES = ("conv", "shortcut", "ff2")
CALLS, REPLAYS = 10, 7
ACTIVATED = "input_blocks.1.0.in_layers.2"  # a convolution after SiLU: its 8-bit codes have a zero point


def main() -> int:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="no new shape after so long")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    start, totals = time.perf_counter(), dict.fromkeys(("token", "token16", "fp16"), 0.0)
    environment = {"kind": "wide codes", "stepquant": VERSION, "commit": os.environ.get("STEPQUANT_COMMIT"), "torch": torch.__version__}
    environment |= {"command": " ".join(["python", "benchmarks/wide_codes.py", *sys.argv[1:]])}
    environment |= {"gpu": torch.cuda.get_device_name(), "utc": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    sys.stdout.write(f"{environment['gpu']}, torch {torch.__version__}\n")
    sys.stdout.write("role, M, N, K, calls a step | us token, token16, fp16 | dB token, token16, fp16\n")
    for product in (one for one in PRODUCTS if one.role in ROLES and not one.variant and len(one.K) == 1):
        if time.perf_counter() - start > args.seconds:
            sys.stdout.write("out of time\n")
            break
        record = measured(product)
        for name in totals:
            totals[name] += product.count * record["us"][name]
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(environment | record) + "\n")
        times, decibels = (" ".join(f"{value:8.1f}" for value in record[key].values()) for key in ("us", "db"))
        sys.stdout.write(f"{product.role:9}{product.M:6}{product.N:6}{product.K[0]:6} x{product.count:<3}| {times} | {decibels}\n")
        sys.stdout.flush()
    sys.stdout.write("sum over a step, ms: " + ", ".join(f"{name} {value / 1e3:.2f}" for name, value in totals.items()) + "\n")
    return 0


def measured(product: SdxlProduct) -> dict[str, object]:
    """Times in us and errors in dB of one shape, against fp32 with the same int8 weight."""
    calls, exact = convolution_calls(product) if product.op == "conv3x3" else linear_calls(product)
    found = {name: sqnr_db(exact, call().float()) for name, call in calls.items()}
    return {
        "role": product.role, "M": product.M, "N": product.N, "K": product.K[0], "count": product.count,
        "us": {name: round(microseconds(call), 2) for name, call in calls.items()},
        "db": {name: round(value, 1) for name, value in found.items()},
    }  # fmt: skip


def layer_of(weight: Tensor, scheme: Scheme, bias: Tensor, name: str) -> compute.LayerTensors:
    codes = quantize_weight(weight, name)
    sums = None if scheme.symmetric else compute.sums_of_codes(codes.codes)
    return compute.LayerTensors(name, scheme, codes.codes, codes.scale, bias, sums)


def convolution_calls(product: SdxlProduct) -> tuple[dict[str, Callable[[], Tensor]], Tensor]:
    C, N, side = product.K[0], product.N, product.side
    x = (2 * torch.randn(BATCH, C, side, side, device="cuda")).half().contiguous(memory_format=torch.channels_last)
    norm = fused.NormTensors(1 + 0.3 * torch.randn(C, device="cuda").half(), 0.3 * torch.randn(C, device="cuda").half(), 1e-5)
    weight, bias = torch.randn(N, C, 3, 3, device="cuda") / (3 * C**0.5), torch.randn(N, device="cuda").half()
    addend = torch.randn(BATCH, N, device="cuda").half()
    token, wide = (layer_of(weight, scheme, bias, ACTIVATED) for scheme in (Scheme(symmetric=False), TOKEN16))
    dense = (token.qweight.float() * token.weight_scale.view(-1, 1, 1, 1)).permute(0, 3, 1, 2).contiguous()
    half = dense.half().contiguous(memory_format=torch.channels_last)

    def in_fp16() -> Tensor:
        y = dispatch.group_norm_silu(x, norm.weight, norm.bias, norm.eps)
        return functional.conv2d(y, half, bias, 1, 1) + addend[:, :, None, None]

    calls = {
        "token": lambda: fused.activated_convolution(x, norm, None, token, True, addend, 1, 1),
        "token16": lambda: fused.activated_convolution(x, norm, None, wide, False, addend, 1, 1),
        "fp16": in_fp16,
    }
    y = functional.silu(functional.group_norm(x.float(), 32, norm.weight.float(), norm.bias.float(), norm.eps))
    return calls, functional.conv2d(y.contiguous(), dense, bias.float(), 1, 1) + addend.float()[:, :, None, None]


def linear_calls(product: SdxlProduct) -> tuple[dict[str, Callable[[], Tensor]], Tensor]:
    K, N = product.K[0], product.N
    x, bias = torch.randn(product.M, K, device="cuda").half(), torch.randn(N, device="cuda").half()
    weight, addend = torch.randn(N, K, device="cuda") / K**0.5, torch.randn(product.M, N, device="cuda").half()
    token, wide = (layer_of(weight, scheme, bias, "middle_block.1.proj_in") for scheme in (Scheme(), TOKEN16))
    dense = token.qweight.float() * token.weight_scale[:, None]
    half = dense.half()
    calls = {
        "token": lambda: fused.product(dispatch.quantize_token(x), token, x.dtype, addend),
        "token16": lambda: fused.product(dispatch.quantize_wide(x), wide, x.dtype, addend),
        "fp16": lambda: functional.linear(x, half, bias) + addend,
    }
    return calls, functional.linear(x.float(), dense, bias.float()) + addend.float()


def microseconds(call: Callable[[], Tensor]) -> float:
    """Median over replays of a CUDA graph of CALLS calls."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(REPLAYS):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(1e3 * first.elapsed_time(last) / CALLS)
    return statistics.median(times)


if __name__ == "__main__":
    raise SystemExit(main())
