"""Channel groups against token and static scales: SQNR on single layers of SDXL's widths and on the demo model; time on a GPU.

    python benchmarks/channel_groups.py [--part layers demo hard attention speed] [--prompts 4] [--steps 10]

JSON lines are appended to benchmarks/results/channel_groups.jsonl. 6 bits are simulated: int8 kernels have no 6-bit codes.
`layers` and `speed` need torch alone; the others, in channel_group_models.py, the demo model and diffusers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from stepquant.kernels import dispatch
from stepquant.quant.activation_choice import choose_grouping
from stepquant.quant.activation_noise import output_sqnr_db, simulated_rows
from stepquant.quant.kmeans_groups import kmeans_groups
from stepquant.quant.observer import LayerObserver, LayerStatistics
from stepquant.quant.scheme import ActivationMode, Scheme
from stepquant.quant.timestep import uniform_groups
from stepquant.version import VERSION

sys.path.insert(0, str(Path(__file__).parent))
OUT = Path(__file__).parent / "results" / "channel_groups.jsonl"
PARTS = ("layers", "demo", "hard", "attention", "speed")
GROUP_COUNTS = (1, 2, 4, 8, 16)
# (name, K, N, taps): SDXL's Linears and the convolution of its deep level
WIDTHS = [("to_q", 640, 640, 1), ("to_q", 1280, 1280, 1), ("ff.net.2", 5120, 1280, 1), ("conv", 1280, 1280, 3)]
# 13 of 1280 channels stand out (research on SDXL's Linears; MixDQ's figures for ff.net.2 and the start token are of this size).
OUTLIER_SHARE, OUTLIER_FACTORS = 0.01, (10.0, 30.0)
ROWS = 256
# M, N, K of the timed products, SDXL at 1024x1024 with CFG
PRODUCTS = [(2048, 1280, 1280), (2048, 10240, 1280), (2048, 1280, 5120), (8192, 640, 640)]
# Calls of a timed CUDA graph: their operands rotate through more memory than an H100's 50 MB of L2.
ROTATED_BYTES, MIN_CALLS, REPLAYS = 125 << 20, 12, 9


def main() -> int:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS[:4]))
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--groups", type=int, nargs="+", default=list(GROUP_COUNTS), help="most channel groups of the measured recipes")
    parser.add_argument("--growth", type=float, help="hard: widen every range by this instead of matching SDXL's sensitivity")
    parser.add_argument("--calibration-prompts", type=int, default=6)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    runs = {"layers": single_layers, "speed": speed}
    with args.out.open("a", encoding="utf-8") as file:
        for part in args.part:
            run = runs[part] if part in runs else getattr(importlib.import_module("channel_group_models"), part)
            for record in run(args):
                sys.stdout.write(json.dumps(record) + "\n")
                sys.stdout.flush()
                file.write(json.dumps({"kind": f"channel_groups {part}", **record, **_environment()}) + "\n")
                file.flush()
    return 0


def _environment() -> dict[str, object]:
    return {
        "stepquant": VERSION,
        "commit": os.environ.get("STEPQUANT_COMMIT"),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": " ".join(["python", "benchmarks/channel_groups.py", *sys.argv[1:]]),
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def single_layers(args: argparse.Namespace) -> Iterator[dict]:
    """Synthetic inputs with outlier channels whose size drifts from row to row, as it does over timesteps and tokens."""
    generator = torch.Generator().manual_seed(0)
    for name, K, N, taps in WIDTHS:
        for factor in OUTLIER_FACTORS:
            x = torch.randn(ROWS, K, generator=generator)
            outliers = torch.randperm(K, generator=generator)[: round(OUTLIER_SHARE * K)]
            x[:, outliers] *= factor
            x *= torch.exp(torch.randn(ROWS, 1, generator=generator) / 4)
            weight = torch.randn((N, K) if taps == 1 else (N // 4, K, taps, taps), generator=generator) / K**0.5
            for bits in (8, 6):
                shape = {"layer": name, "K": K, "outlier_factor": factor, "bits": bits, "simulated": bits < 8}
                yield from ({**shape, **row} for row in _layer_rows(_observed(x), weight, bits))


def _observed(x: Tensor) -> LayerStatistics:
    observer = LayerObserver(x.shape[1])
    for part in x.split(16):
        observer.update(part[None], [20])
    return observer.statistics()


def _layer_rows(statistics: LayerStatistics, weight: Tensor, bits: int) -> Iterator[dict]:
    groups, rows, is_conv = uniform_groups(1), statistics.rows.float(), weight.ndim == 4

    def row(mode: str, noisy: Tensor, count: int = 1, effective: int = 1, granularity: int = 0) -> dict:
        sqnr = round(output_sqnr_db(rows, noisy, weight), 2)
        return {"mode": mode, "groups": count, "effective_groups": effective, "granularity": granularity, "sqnr_db": sqnr}

    for mode in (ActivationMode.TOKEN, ActivationMode.STATIC):
        yield row(mode.value, simulated_rows(statistics, Scheme(activation=mode), groups, is_conv=is_conv, bits=bits))
    for count in GROUP_COUNTS[1:]:
        found = kmeans_groups(statistics.range_min[0], statistics.range_max[0], count)
        yield row("paper's k-means, static", found.quantized(rows, bits), count, len(found.low), 1)
        for granularity in (64, 8):
            if count > weight.shape[1] // granularity:
                continue
            for base in (ActivationMode.TOKEN, ActivationMode.STATIC):
                scheme = Scheme(activation=ActivationMode.CHANNEL_GROUP, channel_groups=count, granularity=granularity, group_base=base)
                grouping = choose_grouping("layer", statistics, weight, scheme, groups, is_conv, bits)
                noisy = simulated_rows(statistics, scheme, groups, is_conv=is_conv, bits=bits, grouping=grouping)
                yield row(f"channel_group on {base.value}", noisy, count, grouping.groups, granularity)


def speed(args: argparse.Namespace) -> Iterator[dict]:
    """What channel groups cost the product and the quantization on this GPU, int8 without groups beside it.

    Medians of CUDA graphs: with the gaps between launches, without Python. `cost` is of the product alone.
    """
    for M, N, K in PRODUCTS:
        copies = min(MIN_CALLS, ROTATED_BYTES // (M * K + N * K + 2 * M * N) + 1)
        inputs = [torch.randn(M, K, device="cuda").half() for _ in range(copies)]
        activations = [dispatch.quantize_token(x) for x in inputs]
        weights = [torch.randint(-127, 128, (N, K), dtype=torch.int8, device="cuda") for _ in range(copies)]
        pairs, ones = list(zip(activations, weights, strict=True)), torch.ones(N, device="cuda")
        plain = _graph_ms(lambda pair, ones=ones: dispatch.int8_gemm(*pair, ones), pairs)
        token = _graph_ms(dispatch.quantize_token, inputs)
        for granularity in (64, 128):
            for count in (1, 2, 4, 8):
                if count > K // granularity:
                    continue
                exponents = torch.tensor([max(0, count - 1 - block) for block in range(K // granularity)], dtype=torch.int8)
                groups = dispatch.channel_groups(torch.randperm(K).int().cuda(), exponents, granularity)

                def product(pair: Sequence, groups=groups, ones=ones) -> Tensor:
                    return dispatch.channel_group_gemm(pair[0], groups, pair[1], ones)

                grouped = _graph_ms(product, pairs)
                quantize = _graph_ms(lambda x, groups=groups: dispatch.quantize_channel_group(x, groups), inputs)
                record = {"shape": [M, N, K], "groups": count, "granularity": granularity, "p50_ms": round(grouped, 5)}
                record |= {"plain_p50_ms": round(plain, 5), "cost": round(grouped / plain - 1, 3)}
                yield record | {"quantize_p50_ms": round(quantize, 5), "quantize_token_p50_ms": round(token, 5)}


def _graph_ms(call: Callable[[object], object], operands: Sequence) -> float:
    """Median time of a call inside of a CUDA graph that goes through all operands."""
    call(operands[0])
    torch.cuda.synchronize()
    rounds = -(-MIN_CALLS // len(operands))
    graph, outputs = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            outputs = [call(operand) for operand in operands]
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / (rounds * len(operands)))
    del outputs
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
