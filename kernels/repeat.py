"""Repeats an operation's kernel launches for operands of the same layout, without the Python that worked them out. No kernels.

The first call with a layout runs as it is written; what it allocates and launches is noted. Later calls allocate and
launch the same, with the addresses of their own tensors: 2 us a launch where the checks, the tables and Triton's own
dispatch take 100. Layout: shapes, strides, dtypes, devices, the addresses' last 4 bits, and every value that is no tensor.

An operation can be repeated if all it does is to allocate with `empty`, to launch with `launch`, and to have torch compute
with `call`, on its operands and on parts of them, and to return such tensors. One that does anything else (copies an operand
with torch, uses a workspace) is found out at its first call and runs as it is written every time.
"""

from __future__ import annotations

import copy
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .plan import Plan
from .recording import PLAIN, NotRepeatableError, Recording, launch_now

# Kernels and tensor descriptors take addresses that are multiples of 16 bytes another way.
ALIGNMENT_BITS = 15
# Layouts kept per operation: dozens for each resolution and batch size. Then all are forgotten.
MOST_LAYOUTS = 4096
UNKNOWN = object()
# Layouts of kept operands, by numbers that are quicker to compare.
_numbers: dict[tuple, int] = {}
_counter = itertools.count()

_all: weakref.WeakSet[Repeated] = weakref.WeakSet()
_thread = threading.local()


def _watcher() -> Any:
    return None if torch.compiler.is_compiling() else getattr(_thread, "watcher", None)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty, for what kernels fill in."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if (watcher := _watcher()) is not None:
        watcher.made.append(tensor)
    return tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants) of a Triton kernel; all of its parameters must be given."""
    if (watcher := _watcher()) is None:
        launch_now(kernel, grid, arguments, constants)
    else:
        watcher.launch(kernel, grid, arguments, constants)


@contextmanager
def watched_by(watcher: Any) -> Iterator[None]:
    """What this thread allocates is appended to watcher.made, and what it launches is left to watcher.launch."""
    _thread.watcher = watcher
    try:
        yield
    finally:
        _thread.watcher = None


def call(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors) of torch's, whose result has memory of its own: repeated by calling it again."""
    result = function(*tensors)
    if (watcher := _watcher()) is not None:
        watcher.called(function, tensors, result)
    return result


class Repeated:
    """A function whose launches are repeated on NVIDIA GPUs; elsewhere, and inside another one, it is the function itself.

    Arguments: a tensor first; tensors, plain values, None, tuples and lists of these, and objects with `operands`, a tuple
    of the same, or Kept.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._plans: dict[tuple, Plan | None] = {}
        _all.add(self)

    def forget(self) -> None:
        """Work everything out anew."""
        self._plans.clear()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not _is_possible(arguments[0]):
            return self._function(*arguments, **named)
        tensors: list[Tensor] = []
        addresses: list[int] = []
        layout: list[Any] = []
        try:
            for argument in arguments:
                _add_layout(argument, tensors, addresses, layout)
            for name, argument in named.items():
                layout.append(name)
                _add_layout(argument, tensors, addresses, layout)
        except NotRepeatableError:
            return self._function(*arguments, **named)
        key = tuple(layout)
        plan = self._plans.get(key, UNKNOWN)
        if plan is UNKNOWN:
            return self._first(key, tensors, arguments, named)
        return self._function(*arguments, **named) if plan is None else plan(tensors, addresses)

    def _first(self, key: tuple, tensors: list[Tensor], arguments: tuple, named: dict[str, Any]) -> Any:
        recording = Recording(tensors)
        with watched_by(recording):
            result = self._function(*arguments, **named)
        if len(self._plans) >= MOST_LAYOUTS:
            self._plans.clear()
        self._plans[key] = recording.plan(result)
        return result


def forget_plans() -> None:
    """Work everything out anew, after what launches depend on beside their operands has changed: a table, a backend."""
    for repeated in list(_all):
        repeated.forget()


class Kept:
    """Operands that stay together, whose layout is worked out once: a layer's weight. Valid while each stays at its place."""

    def __init__(self, *operands: Any) -> None:
        self.tensors: list[Tensor] = []
        layout: list[Any] = []
        for operand in operands:
            _add_layout(operand, self.tensors, [], layout)
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        self.number = _numbers.setdefault(tuple(layout), next(_counter))

    def __deepcopy__(self, memo: dict) -> Kept:
        copied = object.__new__(Kept)
        copied.tensors, copied.number = copy.deepcopy(self.tensors, memo), self.number
        copied.addresses = [tensor.data_ptr() for tensor in copied.tensors]
        return copied


def _is_possible(first: Any) -> bool:
    if torch.compiler.is_compiling() or (isinstance(first, Tensor) and (not first.is_cuda or torch.version.hip is not None)):
        return False
    return getattr(_thread, "watcher", None) is None


def _add_layout(value: Any, tensors: list[Tensor], addresses: list[int], layout: list[Any]) -> None:
    kind = type(value)
    if kind is Tensor or kind is Parameter:
        for number, known in enumerate(tensors):
            if known is value:  # what is passed twice now must be passed twice then
                layout.append(number)
                return
        address = value.data_ptr()
        tensors.append(value)
        addresses.append(address)
        layout.append((value.shape, value.stride(), value.dtype, value.get_device(), address & ALIGNMENT_BITS))
    elif kind in PLAIN:
        layout.append(value)
    elif kind is Kept:
        tensors += value.tensors
        addresses += value.addresses
        layout.append(value.number)
    elif isinstance(value, tuple | list):
        layout.append(len(value))
        for part in value:
            _add_layout(part, tensors, addresses, layout)
    elif (operands := getattr(value, "operands", None)) is not None:
        layout.append(kind)
        for part in operands:
            _add_layout(part, tensors, addresses, layout)
    elif isinstance(value, Enum):
        layout.append(value)
    else:
        raise NotRepeatableError
