"""Compiles the kernels that some work is going to launch, several at a time, before any of them is launched.

One after the other, the 40 kernels of an SDXL step take most of half a minute from an empty cache. Threads serve: what is
slow is LLVM, ptxas and the C compiler of Triton's launchers, and none of them holds Python's lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor

from ..repeat import watched_by

MOST_THREADS = 16


class _Requests:
    """Stands in for launches: asks for each kernel once."""

    def __init__(self) -> None:
        self.made: list[Tensor] = _Unwanted()
        self._seen: set[tuple] = set()

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any]) -> None:
        key = (kernel, tuple(map(_kind, arguments)), tuple(constants.items()))
        if key not in self._seen:
            self._seen.add(key)
            kernel.warmup(*arguments, grid=grid, **constants)

    def called(self, *_: object) -> None:
        """Done already: its result has the right shape."""


class _Unwanted(list):
    def append(self, _: object) -> None:
        """The work's tensors may be freed as it goes."""


def _kind(argument: Any) -> object:
    """What Triton compiles an argument for, or something finer."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(base := getattr(argument, "base", None), Tensor):
        return base.dtype, tuple(argument.block_shape)
    return (argument == 1, argument % 16 == 0, argument.bit_length() > 31) if type(argument) is int else type(argument)


class _CompilingAndLoading:
    """An executor for Triton's asynchronous mode whose tasks also make the compiled kernel ready to be launched."""

    def __init__(self, pool: ThreadPoolExecutor, device: torch.device) -> None:
        self._pool, self._device = pool, device

    def submit(self, compile_kernel: Callable[[], Any]) -> Future:
        return self._pool.submit(self._run, compile_kernel)

    def _run(self, compile_kernel: Callable[[], Any]) -> Any:
        kernel = compile_kernel()
        with torch.cuda.device(self._device):
            _ = kernel.run  # builds or finds the launcher, and loads the machine code
        return kernel


def compile_ahead(work: Callable[[], object], device: torch.device) -> None:
    """Do `work`, but compile its kernels where it would launch them: its results are arbitrary values of the right shapes.

    A kernel that does not compile says so when it is launched. Does nothing before Triton 3.5, which cannot do it.
    """
    if not hasattr(triton, "AsyncCompileMode"):
        return
    with (
        ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "stepquant compiles") as pool,
        triton.AsyncCompileMode(_CompilingAndLoading(pool, device), ignore_errors=True),
        watched_by(_Requests()),
    ):
        work()
    # What the work allocated is cached for this stream; the real work may run on another, whose cache would come on top.
    torch.cuda.empty_cache()
