"""Kernel tables: every file is readable and small enough, what they say is found, what is broken is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from stepquant.errors import FormatError
from stepquant.kernels import tables
from stepquant.kernels.design import Design
from stepquant.kernels.sdxl_products import PRODUCTS
from stepquant.kernels.tables import FOLDER, Product, Table, read_table

SMS = [80, 86, 89, 90, 120]
MAX_KERNELS = 12


def table_file(tmp_path: Path, **changes) -> Path:
    content = {
        "format": 1, "sm": 90, "measured": True, "gpu": "GPU under test", "compute": "int8",
        "designs": {"wide": {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}},
        "rows": [{"op": "gemm", "dtype": "int8", "segments": 1, "M": 2048, "N": 1280, "K": 640, "design": "wide"}],
    }  # fmt: skip
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps(content | changes), encoding="utf-8")
    return path


def test_shipped_tables_cover_every_sdxl_product():
    shapes = {(p.op, len(p.K), p.M, p.N, sum(p.K)) for p in PRODUCTS if not p.variant}
    assert {int(path.stem.removeprefix("sm_")) for path in FOLDER.glob("*.json")} == set(SMS)
    for sm in SMS:
        table = tables.load_table(sm)
        assert table.sm == sm
        for op, segments, M, N, K in shapes:
            assert table.find(Product(op, "int8", segments, M, N, K)) is not None, (sm, op, M, N, K)


@pytest.mark.parametrize("static", [True, False], ids=["static", "token"])
@pytest.mark.parametrize("sm", SMS)
def test_sdxl_needs_at_most_a_dozen_compiled_kernels(sm, static):
    pytest.importorskip("triton", reason="Triton is not installed: nothing is compiled")
    sys.path.insert(0, str(Path(__file__).parent))
    from kernel_launches import launches

    for dtype in ("int8", "fp8") if sm >= 89 else ("int8",):
        needed = launches([product for product in PRODUCTS if not product.variant], sm, dtype, static)
        assert len(needed) <= MAX_KERNELS, "\n".join(launch.label for launch in needed)


def test_table_serves_other_sizes_of_m_down_to_half_and_up_to_double(tmp_path):
    table = read_table(table_file(tmp_path))
    for M, found in ((2048, True), (1024, True), (4096, True), (1000, False), (4100, False)):
        assert (table.find(Product("gemm", "int8", 1, M, 1280, 640)) is not None) == found
    assert table.find(Product("gemm", "int8", 1, 2048, 1280, 1280)) is None
    assert table.find(Product("gemm", "fp8", 1, 2048, 1280, 640)) is None
    assert table.find(Product("gemm", "int8", 2, 2048, 1280, 640)) is None


def test_table_takes_the_nearest_row_when_several_serve():
    small, large = Design(64, 64, 64, 4, 3), Design(128, 128, 64, 8, 3)
    rows = {Product("gemm", "int8", 1, 2048, 64, 64): small, Product("gemm", "int8", 1, 4096, 64, 64): large}
    table = Table(90, True, "int8", rows)
    assert table.find(Product("gemm", "int8", 1, 2500, 64, 64)) is small
    assert table.find(Product("gemm", "int8", 1, 3500, 64, 64)) is large


def test_table_is_read_anew_after_it_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    tables.forget_tables()
    try:
        product = Product("gemm", "int8", 1, 2048, 1280, 640)
        assert tables.tuned_design(90, product) is None
        table_file(tmp_path, compute="fp8")
        assert tables.tuned_design(90, product) is None
        tables.forget_tables()
        assert tables.tuned_design(90, product) == Design(128, 256, 128, 8, 3)
        assert tables.compute_type(90) == "fp8" and tables.compute_type(86) == "int8"
    finally:
        monkeypatch.undo()
        tables.forget_tables()


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2}, {"compute": "int4"}, {"designs": {}}, {"designs": {"wide": {"BLOCK_M": 128}}},
        {"designs": {"wide": {"BLOCK_M": 100, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}}},
        {"rows": [{"op": "gemm"}]}, {"rows": [{"op": "gemv", "dtype": "int8", "M": 1, "N": 1, "K": 1, "design": "wide"}]},
    ],
    ids=["format", "compute", "no such design", "no sizes", "odd size", "short row", "unknown op"],
)  # fmt: skip
def test_table_of_another_format_is_refused_by_name(changes, tmp_path):
    with pytest.raises(FormatError, match="table"):
        read_table(table_file(tmp_path, **changes))


def test_table_that_is_no_json_is_refused_by_name(tmp_path):
    path = tmp_path / "sm_86.json"
    path.write_text('{"format": 1, ', encoding="utf-8")
    with pytest.raises(FormatError, match=r"sm_86\.json.*tune\.py"):
        read_table(path)
