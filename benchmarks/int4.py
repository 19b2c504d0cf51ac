"""Times W4A8 against int8 on this GPU, for every Linear of an SDXL step, with a few designs each. Products only, no whole UNet.

    python benchmarks/int4.py [--out benchmarks/results/int4.jsonl]

CUDA graphs of calls whose operands rotate through more memory than the L2 holds, so without Python. Every design is checked
against the reference first. JSON lines are appended, one per product; the last line printed is the step's total.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.design import Design
from stepquant.kernels.int4_gemm import int4_gemm_ref
from stepquant.kernels.int4_weight import expanded_codes, paired_scales
from stepquant.kernels.sdxl_products import PRODUCTS
from stepquant.kernels.tables import forced_design
from stepquant.kernels.triton_ops.int4_gemm import int4_gemm
from stepquant.kernels.triton_ops.int8_gemm import int8_gemm
from stepquant.version import VERSION

OUT = Path(__file__).parent / "results" / "int4.jsonl"
DEVICE, TOLERANCE = "cuda", 5e-4
ROTATED_BYTES, CALLS, REPLAYS = 150e6, 12, 5
TILES = ((128, 128, 8, 3), (128, 128, 8, 4), (64, 128, 4, 4), (128, 64, 4, 4), (256, 64, 4, 3), (64, 64, 4, 4))
LARGE = [
    Design(BLOCK_M, BLOCK_N, 128, warps, stages, tma=tma)
    for tma in (True, False)
    for BLOCK_M, BLOCK_N, warps, stages in (
        (128, 128, 8, 3),
        (128, 128, 8, 4),
        (64, 128, 4, 4),
        (128, 64, 4, 4),
        (256, 64, 4, 3),
        (64, 64, 4, 4),
    )
]
SMALL = [Design(BLOCK_M, BLOCK_N, 128, 4, 4) for BLOCK_M in (16, 32, 64) for BLOCK_N in (32, 64, 128)]
Operands = tuple[QuantizedActivation, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def operands(M: int, N: int, K: int, seed: int) -> Operands:
    """An activation per token, packed weight, group scales, channel scales, and the same weight as int8 codes."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    codes = torch.randint(-127, 128, (M, K), generator=generator, device=DEVICE, dtype=torch.int8)
    rows = QuantizedActivation(codes, torch.rand(M, generator=generator, device=DEVICE) * 1e-2, None, 1)
    qweight = torch.randint(0, 256, (N, K // 2), generator=generator, device=DEVICE, dtype=torch.uint8)
    group_scale = paired_scales(torch.randint(4, 16, (K // 64, N), generator=generator, device=DEVICE, dtype=torch.int8))
    scale = torch.rand(N, generator=generator, device=DEVICE) * 1e-3
    return rows, qweight, group_scale, scale, expanded_codes(qweight, group_scale, K)


def with_4_bits(one: Operands) -> torch.Tensor:
    return int4_gemm(*one[:4])


def with_8_bits(one: Operands) -> torch.Tensor:
    return int8_gemm(one[0], one[4], one[3])


def median_us(call: Callable[[Operands], torch.Tensor], sets: list[Operands]) -> float:
    for one in sets[:2]:
        call(one)
    graph, calls = torch.cuda.CUDAGraph(), max(CALLS, len(sets))
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(sets[index % len(sets)])
    times = []
    for _ in range(REPLAYS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / calls)
    return statistics.median(times[1:])


def measured(M: int, N: int, K: int) -> dict[str, object]:
    """The table's or default design of both, and every candidate of W4A8, in microseconds."""
    copies = int(min(8, max(2, ROTATED_BYTES // (M * K + 1.5 * N * K + 2 * M * N) + 1)))
    sets = [operands(M, N, K, seed) for seed in range(copies)]
    expected = int4_gemm_ref(*sets[0][:4]).float()
    found = {}
    for design in SMALL if M <= 256 else LARGE:
        try:
            with forced_design(design):
                error = float((with_4_bits(sets[0]).float() - expected).norm() / expected.norm())
                found[design.label] = median_us(with_4_bits, sets) if error <= TOLERANCE else f"wrong by {error:.1e}"
        except Exception as problem:  # what a design cannot do on this GPU is part of the result
            found[design.label] = f"{type(problem).__name__}: {problem}".splitlines()[0][:120]
    return {"int8_us": median_us(with_8_bits, sets), "int4_us": median_us(with_4_bits, sets), "designs_us": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="JSON lines are appended here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("benchmarks/int4.py needs an NVIDIA GPU.\n")
        return 1
    counts: dict[tuple[int, int, int], int] = {}
    for product in PRODUCTS:
        if product.op == "gemm" and not product.variant and product.role != "shortcut":
            shape = (product.M, product.N, product.K[0])
            counts[shape] = counts.get(shape, 0) + (0 if product.cached else product.count)
    totals = [0.0, 0.0]
    for (M, N, K), count in sorted(counts.items(), key=lambda item: -item[0][0] * item[0][1] * item[0][2]):
        record = measured(M, N, K)
        totals = [totals[0] + count * record["int8_us"] / 1e3, totals[1] + count * record["int4_us"] / 1e3]
        facts = {"op": "int4_gemm", "shape": [M, N, K], "count": count, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        stamp = {"stepquant": VERSION, "utc": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts | record | stamp) + "\n")
        sys.stdout.write(f"{M:5} {N:6} {K:5} x {count:3}: int8 {record['int8_us']:7.1f} us, W4A8 {record['int4_us']:7.1f} us\n")
    sys.stdout.write(f"a step's Linears: int8 {totals[0]:.2f} ms, W4A8 {totals[1]:.2f} ms\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
