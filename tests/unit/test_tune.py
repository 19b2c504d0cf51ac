"""Tuning's choice: few kernels, the least time a step. Timing itself needs a GPU and is not tested here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from unittest import mock

import pytest

from stepquant.kernels.sdxl_products import PRODUCTS
from stepquant.kernels.tables import Product, load_table, read_table

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str):
    """A module of benchmarks/, which is no package."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.fixture
def timings():
    """Every candidate of every product on sm_90, with times that differ from product to product."""
    choice, candidates = load("tune_choice"), load("tune_candidates").candidates
    found = []
    for index, product in enumerate(PRODUCTS):
        for dtype in ("int8", "fp8") if product.op != "upsample2x" else ("int8",):
            for number, design in enumerate(candidates(product, dtype, 90)):
                us = product.operations / 1e9 * (1 + (index * 7 + number * 5) % 11 / 10)
                found.append(choice.Timing(product, dtype, design, us))
    return found


def test_tune_keeps_at_most_a_dozen_kernels_and_every_shape(timings):
    choice = load("tune_choice")
    chosen = choice.choose(timings)
    assert {timing.shape for timing in chosen} == {timing.shape for timing in timings}
    for dtype in ("int8", "fp8"):
        roles: dict[tuple, set[tuple]] = {}
        for timing in timings:
            roles.setdefault(timing.shape, set()).add((bool(timing.product.addend), timing.product.asymmetric))
        kernels = set().union(*(t.kernels(roles) for t in chosen if t.dtype == dtype and not t.product.variant))
        assert len(kernels) <= choice.MAX_KERNELS


def test_tune_takes_each_shapes_best_when_kernels_may_be_many(timings):
    choice = load("tune_choice")
    best = {shape: min(t.step_us for t in found) for shape, found in choice.by_shape(timings).items()}
    chosen = choice.choose(timings, limit=1000)
    # Variants are limited apart.
    assert {t.shape: t.step_us for t in chosen if not t.product.variant} == {
        t.shape: best[t.shape] for t in chosen if not t.product.variant
    }
    assert choice.step_ms(chosen, "int8") <= choice.step_ms(choice.choose(timings), "int8")


def test_tune_gives_up_the_design_that_costs_the_least():
    choice, product = load("tune_choice"), next(p for p in PRODUCTS if p.role == "ff2" and p.M == 2048)
    other = next(p for p in PRODUCTS if p.role == "ff2" and p.M == 8192)
    fast, slow = load("tune_candidates").candidates(product, "int8", 90)[:2]
    timings = [
        choice.Timing(product, "int8", fast, 10.0), choice.Timing(product, "int8", slow, 12.0),  # 60 calls a step: 120 us to lose
        choice.Timing(other, "int8", fast, 15.0), choice.Timing(other, "int8", slow, 10.0),  # 10 calls a step: 50 us to lose
    ]  # fmt: skip
    assert {timing.design for timing in choice.choose(timings, limit=1)} == {fast}


@pytest.fixture
def tune():
    """tune.py itself, which needs Triton."""
    pytest.importorskip("triton", reason="Triton is not installed: tune.py is not used")
    yield load("tune")
    mock.patch.stopall()  # a process that compiles patches the launchers for its whole life


def test_tune_hands_a_kernel_to_the_compiler_for_every_job_that_matches(tune, monkeypatch, capsys):
    compiled = []

    class Compiler:
        def __init__(self, kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **constants: compiled.append(self.kernel)

    monkeypatch.setattr(tune, "_Warmup", Compiler)
    jobs = tune.jobs(["int8", "fp8"], 90, r"2048x1280x1280 residual|int8.*2048x10240|upsample2x")
    assert {job.product.op for job in jobs} == {"gemm", "geglu", "conv3x3", "upsample2x"} and {job.dtype for job in jobs} == {"int8", "fp8"}
    tune.compile_shard(jobs, 90, 0, 1)
    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {report["job"] for report in reports} == {job.index for job in jobs}
    assert {report["problem"] for report in reports} == {""}
    assert len(compiled) == sum(job.design.backend in ("triton", "gluon") for job in jobs)


def test_tune_of_some_products_keeps_the_tables_other_rows(tune, timings, tmp_path):
    path, before = tmp_path / "sm_90.json", load_table(90)
    timed = [timing for timing in timings if timing.product.op.startswith("conv3x3") and timing.dtype == "int8"]
    tune.write_table(path, timed, 90, "GPU under test", tune.kept_rows(timed, 90))
    after = read_table(path)
    shapes = {Product(*timing.shape) for timing in timed}
    assert {product: design for product, design in after.rows.items() if product not in shapes} == {
        product: design for product, design in before.rows.items() if product not in shapes
    }
    assert after.compute == before.compute
    best = {Product(*t.shape): t.design for t in load("tune_choice").choose([*timed, *tune.kept_rows(timed, 90)])}
    assert all(after.rows[shape] == best[shape] for shape in shapes)


def test_tune_writes_a_table_that_is_read_back(timings, tmp_path):
    spec = importlib.util.find_spec("triton")
    if spec is None:
        pytest.skip("Triton is not installed: tune.py is not used")
    path = tmp_path / "sm_90.json"
    load("tune").write_table(path, timings, 90, "GPU under test")
    table = read_table(path)
    assert table.measured and json.loads(path.read_text(encoding="utf-8"))["gpu"] == "GPU under test"
    for timing in load("tune_choice").choose(timings):
        op, dtype, segments, M, N, K = timing.shape
        assert table.find(Product(op, dtype, segments, M, N, K)) == timing.design
