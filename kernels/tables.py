"""Tuned tables: which design a shape gets on a GPU architecture. Data in tables/sm_<xx>.json, read at first use; no tuning here.

File: {"format": 1, "sm": 90, "measured": true|false, "gpu": name or null, "compute": "int8"|"fp8",
       "designs": {name: Design fields}, "rows": [{"op", "dtype", "segments", "M", "N", "K", "design": name}]}
op is one of OPERATIONS. M: rows or output pixels; N: output channels; K: input channels of all segments (per tap).
"measured": false says that the designs come from compiled code (registers, instruction counts), not from timing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import FormatError
from .design import Design
from .repeat import forget_plans

FORMAT = 1
FOLDER = Path(__file__).parent / "tables"
OPERATIONS = ("gemm", "geglu", "conv1x1", "conv3x3", "conv3x3_stride2", "upsample2x")
COMPUTE_TYPES = ("int8", "fp8")
DTYPES = (*COMPUTE_TYPES, "int4")  # of rows; int4: 4-bit weights on int8 codes
# A row serves other batch sizes and resolutions down to half and up to double its M.
MAX_LOG2_M = 1.0


@dataclass(frozen=True)
class Product:
    """What a table row is for."""

    op: str
    dtype: str
    segments: int
    M: int
    N: int
    K: int


@dataclass(frozen=True)
class Table:
    """One architecture's table. compute: the faster of the two types for a whole step there."""

    sm: int
    measured: bool
    compute: str
    rows: dict[Product, Design]

    def find(self, product: Product) -> Design | None:
        """The design of the row equal to `product` but for M, which is the nearest and within a factor of two."""
        best, nearest = None, MAX_LOG2_M
        for row, design in self._candidates(product):
            distance = abs(math.log2(product.M / row.M)) if product.M else math.inf
            if distance <= nearest:
                best, nearest = design, distance
        return best

    def _candidates(self, product: Product) -> Iterator[tuple[Product, Design]]:
        return (
            (row, design)
            for row, design in self.rows.items()
            if (row.op, row.dtype, row.segments, row.N, row.K) == (product.op, product.dtype, product.segments, product.N, product.K)
        )


EMPTY = Table(0, False, "int8", {})
_forced: list[Design] = []


@functools.cache
def load_table(sm: int) -> Table:
    """The table of compute capability `sm`; an empty one if there is none."""
    path = FOLDER / f"sm_{sm}.json"
    return read_table(path) if path.is_file() else EMPTY


def read_table(path: Path) -> Table:
    """Raises: FormatError if the file is no table of this format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        designs = {name: Design(**fields) for name, fields in content["designs"].items()}
        rows = {_product(row): designs[row["design"]] for row in content["rows"]}
        if content["compute"] not in COMPUTE_TYPES:
            raise ValueError(f"compute {content['compute']}")
        return Table(int(content["sm"]), bool(content["measured"]), content["compute"], rows)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path.name}: not a kernel table of format {FORMAT} ({type(error).__name__}: {error}). "
            "Make it anew with `python benchmarks/tune.py`, or delete it to use the defaults."
        ) from error


def _product(row: dict) -> Product:
    product = Product(row["op"], row["dtype"], int(row.get("segments", 1)), int(row["M"]), int(row["N"]), int(row["K"]))
    if product.op not in OPERATIONS or product.dtype not in DTYPES or min(product.M, product.N, product.K) < 1:
        raise ValueError(f"row {row}")
    return product


@functools.lru_cache(maxsize=4096)
def _tuned(sm: int, product: Product) -> Design | None:
    return load_table(sm).find(product)


def tuned_design(sm: int, product: Product) -> Design | None:
    """What the table of `sm` says about this product; None where it says nothing."""
    return _forced[-1] if _forced else _tuned(sm, product)


def compute_type(sm: int) -> str:
    """ "int8", or "fp8" where the table says that it measured faster."""
    return load_table(sm).compute


def forget_tables() -> None:
    """Read the tables anew at the next call, after a file has changed."""
    load_table.cache_clear()
    _tuned.cache_clear()
    forget_plans()


@contextlib.contextmanager
def forced_design(design: Design) -> Iterator[None]:
    """Every product inside uses `design`, whatever the table says: for tests and for tuning."""
    _forced.append(design)
    forget_plans()
    try:
        yield
    finally:
        _forced.pop()
        forget_plans()
