"""Times calls on the GPU, one process at a time, and reads its memory; for benchmarks/speed.py. Knows no model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comfyui_session import GIB

CALLS = 20


class Gpu:
    """Times calls on the GPU, or on the CPU for the self-test."""

    def __init__(self, device: str, lock: Path | None = None) -> None:
        """lock: see --lock."""
        self.device = device
        self.is_cuda = device == "cuda"
        self._lock = lock

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While no other process with the same lock is in here."""
        if self._lock is None:
            yield
            return
        import fcntl

        with self._lock.open("a", encoding="utf-8") as file:  # closing it gives the lock back
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def wait(self) -> None:
        import torch

        if self.is_cuda:
            torch.cuda.synchronize()

    def first(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """The output and seconds of a first call."""
        self.wait()
        start = time.perf_counter()
        output = call()
        self.wait()
        return output, time.perf_counter() - start

    def step(self, call: Callable[[], Any]) -> dict[str, object]:
        """A row's time, and the calls it is the median of: a host that is disturbed shows in them."""
        calls = self.calls_ms(call)
        return {"step_ms": statistics.median(calls), "calls_ms": [round(ms, 2) for ms in calls]}

    def calls_ms(self, call: Callable[[], Any], calls: int = CALLS) -> list[float]:
        """Of each call, by CUDA events, after three that are not counted."""
        import torch

        if not self.is_cuda:
            return [1000 * self.first(call)[1] for _ in range(2)]
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        with self.alone():
            for _ in range(3):
                call()
            self.wait()
            for start, end in events:
                start.record()
                call()
                end.record()
            self.wait()
        return [start.elapsed_time(end) for start, end in events]

    def forget_peak(self) -> None:
        import torch

        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, float | None]:
        """peak_gib: of tensors. reserved_gib: of what torch took for them."""
        import torch

        figures = (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
        return dict(zip(("peak_gib", "reserved_gib"), (one() / GIB if self.is_cuda else None for one in figures), strict=True))
