"""Times products with 4-bit weights against int8 on this GPU, for every Linear of an SDXL step, in both forms. No whole UNet.

    python benchmarks/int4.py [--out benchmarks/results/int4.jsonl]

CUDA graphs of calls whose operands rotate through more memory than the L2 holds, so without Python. Every result is checked
against float64 first. W4A8 fused unpacks nibbles on their way into the tensor cores; expanded writes int8 codes out first. Then
rows that stay 16 bit, against cuBLAS with a 16-bit weight. JSON lines are appended; the last lines printed are the step's totals.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.design import EXPANDED, TRITON
from stepquant.kernels.int4_weight import expanded_codes, paired_scales
from stepquant.kernels.sdxl_products import PRODUCTS, SdxlProduct
from stepquant.kernels.triton_ops import int4_geglu_gemm, int4_gemm, int4_gemm_many
from stepquant.kernels.triton_ops.int8_geglu_gemm import int8_geglu_gemm
from stepquant.kernels.triton_ops.int8_gemm import int8_gemm
from stepquant.kernels.triton_ops.int8_gemm_many import int8_gemm_many
from stepquant.version import VERSION

OUT = Path(__file__).parent / "results" / "int4.jsonl"
DEVICE, TOLERANCE = "cuda", 1e-3  # of fp16 results; gelu_erf's and cuBLAS's rounding included
ROTATED_BYTES, CALLS, REPLAYS = 150e6, 16, 5
FORMS = {"fused": TRITON, "expanded": EXPANDED}
TOGETHER, GATED = "self q,k,v", "ff1 with GEGLU"
# M, N, K of Linears whose input stays 16 bit: embeddings of one image and of four with CFG, the prompt, a large layer.
FLOAT_ROWS = [(2, 1280, 1280), (8, 1280, 1280), (154, 1280, 2048), (2048, 1280, 1280)]


@dataclass
class Weight:
    """The same weight as packed nibbles and as int8 codes, each as its products take it."""

    packed: tuple[Tensor, ...]
    codes: tuple[Tensor, ...]

    @classmethod
    def random(cls, N: int, K: int, generator: torch.Generator) -> Weight:
        qweight = torch.randint(0, 256, (N, K // 2), generator=generator, device=DEVICE, dtype=torch.uint8)
        groups = paired_scales(torch.randint(-15, 16, (K // 64, N), generator=generator, device=DEVICE, dtype=torch.int8))
        codes = expanded_codes(qweight, groups, K)
        scale, sums = torch.rand(N, generator=generator, device=DEVICE) * 2e-4 + 1e-4, codes.sum(1, dtype=torch.int32)
        bias = torch.randn(N, generator=generator, device=DEVICE).half()
        return cls((qweight, groups, scale, sums, bias), (codes, scale, sums, bias))

    def floats(self) -> Tensor:
        return self.codes[0].double() * self.codes[1].double()[:, None]


@dataclass
class Operands:
    rows: QuantizedActivation
    weights: list[Weight]

    @classmethod
    def random(cls, product: SdxlProduct, seed: int) -> Operands:
        generator, (K,) = torch.Generator(DEVICE).manual_seed(seed), product.K
        codes = torch.randint(-127, 128, (product.M, K), generator=generator, device=DEVICE, dtype=torch.int8)
        rows = QuantizedActivation(codes, torch.rand(product.M, generator=generator, device=DEVICE) * 0.05 + 0.01, None, 1)
        count = 3 if product.role == TOGETHER else 1
        return cls(rows, [Weight.random(product.N // count, K, generator) for _ in range(count)])

    def expected(self, gated: bool) -> list[Tensor]:
        x = self.rows.dequantize(torch.float64)
        results = [x @ weight.floats().t() + weight.packed[4].double() for weight in self.weights]
        if gated:
            value, gate = results[0].chunk(2, 1)
            results = [value * gelu(gate)]
        return results


def with_4_bits(role: str) -> Callable[[Operands], Any]:
    if role == TOGETHER:
        return lambda one: int4_gemm_many.int4_gemm_many(one.rows, [weight.packed for weight in one.weights])
    call = int4_geglu_gemm.int4_geglu_gemm if role == GATED else int4_gemm.int4_gemm
    return lambda one: call(one.rows, *one.weights[0].packed)


def with_8_bits(role: str) -> Callable[[Operands], Any]:
    if role == TOGETHER:
        return lambda one: int8_gemm_many(one.rows, [weight.codes for weight in one.weights])
    call = int8_geglu_gemm if role == GATED else int8_gemm
    return lambda one: call(one.rows, *one.weights[0].codes)


@contextlib.contextmanager
def in_form(backend: str) -> Iterator[None]:
    """Every int4 product inside is fused, or expanded with int8's own tiles."""

    def chosen(op: str, M: int, N: int, K: int, sm: int) -> Any:
        return replace(int4_gemm.default_int4_design(M, N, sm), backend=backend)

    with contextlib.ExitStack() as stack:
        for module in (int4_gemm, int4_gemm_many, int4_geglu_gemm):
            stack.enter_context(mock.patch.object(module, "int4_design", chosen))
        yield


def median_us(call: Callable[[Any], Any], sets: list[Any]) -> float:
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


def copies_for(bytes_of_one: float) -> int:
    return int(min(10, max(2, ROTATED_BYTES // bytes_of_one + 1)))


def error_of(found: Any, expected: list[Tensor]) -> float:
    found = found if isinstance(found, list) else [found]
    return max(float((y.double() - exact).norm() / exact.norm()) for y, exact in zip(found, expected, strict=True))


def measured(product: SdxlProduct) -> dict[str, object]:
    """Microseconds of W8A8, and of W4A8 in either form; a form that is wrong or does not run says so instead."""
    M, N, K = product.M, product.N, product.K[0]
    sets = [Operands.random(product, seed) for seed in range(copies_for(M * K + 1.5 * N * K + 2 * M * N))]
    expected, four = sets[0].expected(product.role == GATED), with_4_bits(product.role)
    record: dict[str, object] = {"int8_us": median_us(with_8_bits(product.role), sets)}
    for form, backend in FORMS.items():
        with in_form(backend):
            try:
                error = error_of(four(sets[0]), expected)
                record[f"{form}_us"] = median_us(four, sets) if error <= TOLERANCE else f"wrong by {error:.1e}"
            except Exception as problem:  # what a form cannot do on this GPU is part of the result
                record[f"{form}_us"] = f"{type(problem).__name__}: {problem}".splitlines()[0][:120]
    return record


def measured_floats(M: int, N: int, K: int) -> dict[str, object]:
    """W4A16 against cuBLAS with the weight in 16 bit."""
    sets = []
    for seed in range(copies_for(2 * N * K)):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        weight = Weight.random(N, K, generator)
        sets.append((torch.randn(M, K, generator=generator, device=DEVICE).half(), weight, weight.floats().half()))
    x, weight, _ = sets[0]
    error = error_of(int4_gemm.int4_gemm(x, *weight.packed), [x.double() @ weight.floats().t() + weight.packed[4].double()])
    fp16_us = median_us(lambda one: linear(one[0], one[2], one[1].packed[4]), sets)
    w4a16_us = median_us(lambda one: int4_gemm.int4_gemm(one[0], *one[1].packed), sets)
    return {"fp16_us": fp16_us, "w4a16_us": w4a16_us if error <= TOLERANCE else f"wrong by {error:.1e}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="JSON lines are appended here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("benchmarks/int4.py needs an NVIDIA GPU.\n")
        return 1
    stamp = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "stepquant": VERSION}

    def keep(kind: str, shape: tuple[int, ...], record: dict[str, object]) -> None:
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "shape": shape} | record | stamp | {"utc": when}) + "\n")
        shown = ", ".join(f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}" for name, value in record.items())
        sys.stdout.write(f"{kind} {shape}: {shown}\n")

    totals: dict[str, float] = {}
    for product in PRODUCTS:
        wanted = product.op in ("gemm", "geglu") and not product.cached and product.role not in ("shortcut", "ff1")
        if wanted and (not product.variant or product.role == GATED):
            record = measured(product)
            keep(f"int4 {product.role}", (product.M, product.N, product.K[0]), record | {"count": product.count})
            for name, value in record.items():
                totals[name] = totals.get(name, 0.0) + product.count * (value if isinstance(value, float) else float("nan")) / 1e3
    for shape in FLOAT_ROWS:
        keep("w4a16", shape, measured_floats(*shape))
    sys.stdout.write("a step's Linears, ms: " + ", ".join(f"{name.removesuffix('_us')} {ms:.2f}" for name, ms in totals.items()) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
