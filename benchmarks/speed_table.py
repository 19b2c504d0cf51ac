"""The rows of benchmarks/speed.py: each is printed and written as soon as it is there. Measures nothing."""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

FIXED = (
    "kind", "model", "gpu", "sm", "torch", "triton", "commit", "mode", "graph", "step_ms", "peak_gib", "cold_start_s", "sqnr_db",
    "integer_mac_share", "command", "utc",
)  # fmt: skip


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Table:
    """The rows measured so far: each is printed and appended to the file at once."""

    def __init__(self, out: Path | None, seconds: float, facts: dict[str, object]) -> None:
        self.rows: list[dict[str, object]] = []
        self.failed: list[str] = []
        self.reference: Any = None
        self._out, self._facts, self._start, self._seconds = out, facts, time.time(), seconds

    @property
    def seconds_left(self) -> float:
        return self._seconds - (time.time() - self._start)

    def add(self, mode: str, graph: bool, **figures: object) -> None:
        row: dict[str, object] = dict.fromkeys(FIXED) | self._facts | {"mode": mode, "graph": graph} | figures
        row["utc"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.rows.append(row)
        say(self._line(row))
        if self._out is not None:
            with self._out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def keep(self, name: str, text: str) -> Path:
        """Write a log beside the results, or in the temporary folder if there are none."""
        path = (Path(tempfile.gettempdir()) if self._out is None else self._out.parent) / name
        path.write_text(text, encoding="utf-8")
        return path

    def sqnr(self, output: Any) -> float | None:
        from stepquant.quant.sqnr import sqnr_db

        return None if self.reference is None else sqnr_db(self.reference, output.float().cpu())

    @contextmanager
    def attempt(self, mode: str) -> Iterator[None]:
        """One mode's rows; its failure does not stop the next one's."""
        start = time.time()
        try:
            yield
        except Exception as error:
            traceback.print_exc(limit=-5)
            self.failed.append(mode)
            say(f"FAILED {mode}: {type(error).__name__}: {str(error)[:300]}")
        say(f"  [{mode}: {time.time() - start:.1f} s, {self.seconds_left:.0f} s left]")

    def print_all(self) -> None:
        say(f"\n{'mode':<36}{'':<7}{'ms':>9}{'peak GiB':>10}{'cold s':>8}{'SQNR dB':>9}{'int MACs':>10}")
        for row in self.rows:
            say(self._line(row))

    @staticmethod
    def _line(row: dict) -> str:
        def cell(name: str, width: int, form: str) -> str:
            return f"{'-':>{width}}" if row[name] is None else f"{row[name]:>{width}{form}}"

        kind = "" if row["kind"] == "unet step" else row["kind"] + ": "
        figures = cell("step_ms", 9, ".2f") + cell("peak_gib", 10, ".2f") + cell("cold_start_s", 8, ".1f")
        return f"{kind + row['mode']:<36}{'graph' if row['graph'] else 'eager':<7}{figures}{cell('sqnr_db', 9, '.1f')}" + cell(
            "integer_mac_share", 10, ".3f"
        )
