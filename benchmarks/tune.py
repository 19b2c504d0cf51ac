"""Times the candidate designs of every SDXL product on this GPU and writes its kernel table. Products only, no whole UNet.

    python benchmarks/tune.py [--budget 420] [--dtype int8,fp8] [--match EXPRESSION] [--out table.json] [--record results.jsonl]

1. All candidates are compiled by several processes into Triton's disk cache. 2. Each one is checked against the reference
and timed: a CUDA graph of calls whose operands rotate through more memory than the L2 holds, so with the gaps between
launches but without Python. 3. Of all designs at most 12 kernels are kept, those that cost the least time a step. What a
candidate cannot do (compile, fit, be right) is reported and skipped. Table and record are rewritten after every product.
With --match only products whose line matches are timed ("conv3x3|upsample2x"); the GPU's table keeps its other rows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent))
from product_calls import call_arguments, launcher, only_int8, reference
from tune_candidates import candidates
from tune_choice import Timing, by_shape, choose, step_ms

from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.design import GLUON, TRITON, Design
from stepquant.kernels.sdxl_products import PRODUCTS, SdxlProduct
from stepquant.kernels.tables import FOLDER, FORMAT, Product, forced_design, load_table

# Relative norm to the reference. Hopper sums fp8 products with fewer bits than fp32, hence its larger share.
TOLERANCE = {"int8": 5e-4, "fp8": 5e-3}
MIN_CALLS = 12  # in a graph
REPLAYS = 7
ROTATED_L2S = 2.5  # operands of a graph, in multiples of the L2
LARGEST_L2 = 128 << 20  # bytes, where torch does not know
COMPILE_SHARE = 0.5  # of the budget
LARGEST_GAIN_OF_FP8 = 0.95  # fp8 is the table's compute type only if a step takes at most this much of int8's time


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Job:
    """One design of one product."""

    index: int
    product: SdxlProduct
    dtype: str
    design: Design

    @property
    def label(self) -> str:
        p = self.product
        return f"{self.dtype} {p.role} {p.op} {p.M}x{p.N}x{'+'.join(map(str, p.K))}" + (f" {p.addend}" if p.addend else "")


def jobs(dtypes: list[str], sm: int, match: str) -> list[Job]:
    """Every candidate of every product whose label matches, costly products first."""
    ordered = sorted(PRODUCTS, key=lambda p: -p.operations * p.count)
    found = [
        (product, dtype, design)
        for product in ordered
        for dtype in dtypes
        if not (dtype == "fp8" and (sm < 89 or only_int8(product)))
        for design in candidates(product, dtype, sm)
    ]
    return [job for index, parts in enumerate(found) if re.search(match, (job := Job(index, *parts)).label)]


def compile_shard(todo: list[Job], sm: int, shard: int, shards: int) -> None:
    """Compile every shards-th distinct kernel into the disk cache; prints a line per job."""
    from stepquant.kernels.triton_ops import conv_kernel, fp8_geglu_gemm, fp8_gemm, gemm_kernel, int8_conv2d, int8_geglu_gemm, int8_gemm

    for module in (int8_gemm, int8_geglu_gemm, int8_conv2d, fp8_gemm, fp8_geglu_gemm):
        mock.patch.object(module, "compute_capability", lambda device: sm).start()
    mock.patch.object(int8_gemm, "_gemm_kernel", _Warmup(gemm_kernel._gemm_kernel)).start()
    mock.patch.object(int8_geglu_gemm, "_geglu_gemm_kernel", _Warmup(int8_geglu_gemm._geglu_gemm_kernel)).start()
    mock.patch.object(int8_conv2d, "_conv2d_kernel", _Warmup(conv_kernel._conv2d_kernel)).start()
    mock.patch.object(fp8_geglu_gemm, "quantize_token", lambda *_: None).start()
    if any(job.design.backend == GLUON for job in todo):
        from stepquant.kernels.gluon_ops import conv_launch
        from stepquant.kernels.gluon_ops import launch as gluon

        mock.patch.object(gluon, "compute_capability", lambda device: sm).start()
        mock.patch.object(gluon, "_gluon_gemm_kernel", _Warmup(gluon._gluon_gemm_kernel)).start()
        mock.patch.object(gluon, "_gluon_geglu_kernel", _Warmup(gluon._gluon_geglu_kernel)).start()
        mock.patch.object(conv_launch, "_gluon_conv_kernel", _Warmup(conv_launch._gluon_conv_kernel)).start()
    # Jobs of one design follow each other, so that a shard finds what differs in shape only compiled already.
    ordered = sorted(todo, key=lambda job: (job.dtype, job.product.op, len(job.product.K), job.design.label))
    for job in ordered[shard * len(ordered) // shards : (shard + 1) * len(ordered) // shards]:
        problem = ""
        if job.design.backend in (TRITON, GLUON):
            problem = failure(lambda job=job: run(job, call_arguments(job.product, job.dtype, "meta")))
        say(json.dumps({"job": job.index, "problem": problem}))


class _Warmup:
    """Stands in for a kernel: compiles it for its arguments and launches nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *arguments, **constants: self.kernel.warmup(*arguments, grid=grid, **constants)


def compile_all(options: list[str], sm: int, deadline: float) -> dict[int, str]:
    """Job index -> '' or what went wrong, of all jobs that were compiled in time. A crash takes one shard's rest along."""
    shards = max(1, (os.cpu_count() or 2) - 2)
    command = [sys.executable, __file__, *options, "--sm", str(sm)]
    logs = [Path(tempfile.gettempdir()) / f"stepquant_tune_{os.getpid()}_{shard}.log" for shard in range(shards)]
    workers = []
    for shard, log in enumerate(logs):
        with log.open("w", encoding="utf-8") as file:
            workers.append(subprocess.Popen([*command, "--shard", f"{shard}/{shards}"], stdout=file, stderr=subprocess.STDOUT))
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        time.sleep(1)
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
    results: dict[int, str] = {}
    for log, worker in zip(logs, workers, strict=True):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            if line.startswith("{") and line.endswith("}"):
                report = json.loads(line)
                results[report["job"]] = report["problem"]
        if worker.wait() not in (0, -9):
            say(f"  a compiling process ended with {worker.returncode}: {lines[-1] if lines else 'no output'}")
        log.unlink()
    return results


def failure(attempt: Callable[[], Any]) -> str:
    """'' or the exception in one line."""
    try:
        attempt()
        return ""
    except Exception as error:  # compilers and drivers raise whatever they like; here it is a result
        return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def run(job: Job, arguments: dict[str, Any]) -> Any:
    with forced_design(job.design):
        return launcher(job.product, job.dtype)(**arguments)


def floats(result: torch.Tensor | QuantizedActivation) -> torch.Tensor:
    """What the result stands for."""
    return result if isinstance(result, torch.Tensor) else result.codes.float() * result.per_row(result.scale).view(-1, 1)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def operand_sets(product: SdxlProduct, dtype: str) -> list[dict[str, Any]]:
    """As many operands as it takes to keep each call's out of the L2."""
    first = call_arguments(product, dtype, "cuda")
    output_bytes = 2 * product.M * product.N * (4 if product.op == "upsample2x" else 1)
    taps = {"gemm": 1, "geglu": 1, "upsample2x": 16}.get(product.op, 9)
    rows = product.M * 4 if product.op.endswith("stride2") else product.M
    each = rows * sum(product.K) + product.N * sum(product.K) * taps + output_bytes
    l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", LARGEST_L2)
    return [first] + [call_arguments(product, dtype, "cuda") for _ in range(min(MIN_CALLS, int(ROTATED_L2S * l2 / each) + 1) - 1)]


def microseconds(job: Job, operands: list[dict[str, Any]]) -> float:
    """Median time of a call inside a CUDA graph."""
    run(job, operands[0])
    torch.cuda.synchronize()
    graph, kept = torch.cuda.CUDAGraph(), []
    calls = -(-MIN_CALLS // len(operands)) * len(operands)
    with torch.cuda.graph(graph):
        for call in range(calls):
            kept.append(run(job, operands[call % len(operands)]))
            kept = kept[-len(operands) :]  # outputs rotate too
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / calls)
    return statistics.median(times)


def time_product(group: list[Job], problems: dict[int, str], deadline: float) -> list[tuple[Timing, float]]:
    """(timing, error) of all designs of one product that work."""
    product, dtype = group[0].product, group[0].dtype
    operands = operand_sets(product, dtype)
    expected = floats(reference(product, dtype)(**operands[0]))
    say(f"{group[0].label}, {product.count} a step")
    found = []
    for job in group:
        if time.monotonic() > deadline:
            say("  time is up")
            break
        problem = problems.get(job.index, "not compiled in time")
        error = us = 0.0
        if not problem:
            try:
                y = floats(run(job, operands[0]))
                error = relative_error(y, expected)
                same = torch.equal(y, floats(run(job, operands[0])))
                if not (error <= TOLERANCE[dtype] and same):
                    problem = f"wrong: error {error:.1e}, {'the same' if same else 'another result'} when repeated"
                else:
                    us = microseconds(job, operands)
            except Exception as caught:  # out of shared memory, unsupported types: the candidate does not work here
                problem = f"{type(caught).__name__}: {caught}".splitlines()[0][:120]
        if problem:
            say(f"  {job.design.label:<42} {problem}")
        else:
            say(f"  {job.design.label:<42} {us:8.1f} us {product.operations / us / 1e6:7.0f} TOP/s  {error:.0e}")
            found.append((Timing(product, dtype, job.design, us), error))
    return found


def kept_rows(timings: list[Timing], sm: int) -> list[Timing]:
    """What this GPU's table says about shapes that have not been timed: their only design, at no time."""
    timed, table = {timing.shape for timing in timings}, load_table(sm)
    rows = [Timing(product, dtype, Design(1, 1, 1, 1, 1), 0.0) for product in PRODUCTS for dtype in TOLERANCE]
    found = [(row, table.find(Product(*row.shape))) for row in rows if row.shape not in timed]
    return [replace(row, design=design) for row, design in found if design is not None]


def write_table(path: Path, timings: list[Timing], sm: int, gpu: str, kept: Sequence[Timing] = ()) -> None:
    """The table of the best designs so far, in the format of kernels/tables.py; `kept` rows of the one before stay."""
    chosen = choose([*timings, *kept])
    totals = {dtype: step_ms(chosen, dtype) for dtype in ("int8", "fp8")}
    complete = {dtype: {t.shape[:1] + t.shape[2:] for t in chosen if t.dtype == dtype and not only_int8(t.product)} for dtype in totals}
    comparable = complete["int8"] and complete["int8"] == complete["fp8"]
    faster = "fp8" if comparable and totals["fp8"] <= LARGEST_GAIN_OF_FP8 * totals["int8"] else "int8"
    head = {"format": FORMAT, "sm": sm, "measured": True, "gpu": gpu, "compute": load_table(sm).compute if kept else faster}
    designs = {timing.design.label: timing.design for timing in chosen}
    rows = {timing.shape: timing for timing in chosen}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    table = ",\n".join(f"  {json.dumps(label)}: {json.dumps(changed_fields(design))}" for label, design in designs.items())
    body = ",\n".join("  " + json.dumps(timing.row()) for timing in rows.values())
    path.write_text("{\n" + ",\n".join(lines) + f',\n "designs": {{\n{table}\n }},\n "rows": [\n{body}\n ]\n}}\n', encoding="utf-8")


def changed_fields(design: Design) -> dict[str, Any]:
    """The design without what is left at its default."""
    defaults = {field.name: field.default for field in fields(Design)}
    return {name: value for name, value in asdict(design).items() if value != defaults[name]}


def context(sm: int) -> dict[str, Any]:
    return {
        "kind": "tune",
        "gpu": torch.cuda.get_device_name(0),
        "sm": sm,
        "torch": torch.__version__,
        "triton": __import__("triton").__version__,
        "command": " ".join(["python", "benchmarks/tune.py", *sys.argv[1:]]),
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def tune(options: argparse.Namespace, dtypes: list[str], sm: int) -> int:
    start = time.monotonic()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    todo = jobs(dtypes, sm, options.match)
    out = options.out or FOLDER / f"sm_{sm}.json"
    say(f"{torch.cuda.get_device_name(0)} sm_{sm}: {len(todo)} candidates, {options.budget} s, table {out}")
    problems = compile_all(["--dtype", options.dtype, "--match", options.match], sm, start + COMPILE_SHARE * options.budget)
    failed = sum(1 for problem in problems.values() if problem)
    say(f"{time.monotonic() - start:.0f} s: {len(problems)} of {len(todo)} compiled, {failed} failed")
    groups: dict[tuple[SdxlProduct, str], list[Job]] = {}
    for job in todo:
        groups.setdefault((job.product, job.dtype), []).append(job)
    timings: list[Timing] = []
    for group in groups.values():
        if time.monotonic() > start + options.budget:
            say(f"{group[0].label}: time is up")
            continue
        try:
            found = time_product(group, problems, start + options.budget)
        except Exception as error:  # a faulty product must not lose the others' results
            say(f"{group[0].label}: {type(error).__name__}: {error}")
            continue
        timings += [timing for timing, _ in found]
        if options.record:
            with options.record.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(context(sm) | timing.record() | {"error": error}) + "\n" for timing, error in found)
        if timings:
            write_table(out, timings, sm, torch.cuda.get_device_name(0), kept_rows(timings, sm) if options.match else ())
        torch.cuda.empty_cache()
    report(timings, dtypes)
    say(f"{time.monotonic() - start:.0f} s")
    return 0 if timings else 1


def report(timings: list[Timing], dtypes: list[str]) -> None:
    chosen = choose(timings)
    for dtype in dtypes:
        best = step_ms([min(found, key=lambda timing: timing.step_us) for found in by_shape(timings).values()], dtype)
        say(f"{dtype}: {step_ms(chosen, dtype):.2f} ms a step with the table, {best:.2f} ms if every shape had its own kernel")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=420, help="seconds, compiling included")
    parser.add_argument("--dtype", default="int8,fp8", help="int8, fp8 or both")
    parser.add_argument("--match", default="", help="time only products whose line matches this expression: dtype, role, op and shape")
    parser.add_argument("--out", type=Path, help="the table; by default the package's own for this GPU")
    parser.add_argument("--record", type=Path, help="append every timing to this JSON-lines file")
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    parser.add_argument("--sm", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtypes = options.dtype.split(",")
    if options.shard:
        shard, shards = (int(part) for part in options.shard.split("/"))
        compile_shard(jobs(dtypes, options.sm, options.match), options.sm, shard, shards)
        return 0
    if not torch.cuda.is_available():
        say("No CUDA GPU here; this script times kernels on one. The tables in kernels/tables serve without it.")
        return 1
    major, minor = torch.cuda.get_device_capability()
    return tune(options, dtypes, major * 10 + minor)


if __name__ == "__main__":
    raise SystemExit(main())
