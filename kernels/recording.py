"""What one call of an operation allocates and launches, and the plan that does it again with other tensors. For repeat.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# What is the same in every call of one layout.
PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device})


class NotRepeatableError(Exception):
    """The call did something that a plan cannot do again."""


def launch_now(kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any]) -> Any:
    """kernel[grid](*arguments, **constants), also where Triton refuses the tensors. Returns the compiled kernel."""
    if torch.compiler.is_compiling() or not hides_addresses() or not torch.cuda.is_current_stream_capturing():
        return kernel[grid](*arguments, **constants)
    compiled, tensors = kernel.warmup(*arguments, grid=grid, **constants), []

    def place(tensor: Tensor) -> tuple[int, int]:
        tensors.append(tensor)
        return len(tensors) - 1, 0

    one, device = _Launch(compiled, grid, _in_order(kernel, arguments, constants), place), torch.cuda.current_device()
    one(_stream_getter()(device), tensors, [tensor.data_ptr() for tensor in tensors])
    return compiled


@cache
def hides_addresses() -> bool:
    """Whether the driver does not know memory made while a CUDA graph is recorded, until the graph runs: cudaMallocAsync.

    Triton's launcher asks the driver about each tensor, and fails. Such memory cannot be freed outside of the graph either:
    a tensor of a recording that outlives it ends the process (torch 2.11).
    """
    return torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_allocator_backend() == "cudaMallocAsync"


def _in_order(kernel: Any, arguments: tuple, constants: dict[str, Any]) -> list[Any]:
    return [*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :])]


class Recording:
    """What one call allocates and launches."""

    def __init__(self, operands: list[Tensor]) -> None:
        self.made: list[Tensor] = []
        self._operands = operands
        self._launches: list[_Launch] | None = []

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any]) -> None:
        compiled = launch_now(kernel, grid, arguments, constants)
        if self._launches is None:
            return
        try:
            self._launches.append(_Launch(compiled, grid, _in_order(kernel, arguments, constants), self._place))
        except (NotRepeatableError, AttributeError, KeyError):  # also what is no compiled kernel, such as the interpreter's
            self._launches = None

    def plan(self, result: Any) -> Plan | None:
        """The call as a plan; None if it cannot be repeated."""
        try:
            return None if not self._launches else Plan(self.made, self._launches, self._rebuilder(result), self._operands[0])
        except NotRepeatableError:
            return None

    def _place(self, tensor: Tensor) -> tuple[int, int]:
        """(which operand or allocation it is in, bytes from its start). Raises NotRepeatableError if that is not certain."""
        address = tensor.data_ptr()
        inside = [
            (number, address - owner.data_ptr())
            for number, owner in enumerate([*self._operands, *self.made])
            if owner is tensor or owner.data_ptr() <= address < owner.data_ptr() + _extent(owner)
        ]
        if len(inside) != 1:
            raise NotRepeatableError
        return inside[0]

    def _rebuilder(self, value: Any) -> Callable[[list[Tensor]], Any]:
        """A function that makes the same of other operands and allocations."""
        if isinstance(value, Tensor):
            return self._tensor_rebuilder(value)
        if value is None or type(value) in PLAIN:
            return lambda _: value
        if isinstance(value, tuple | list):
            kind, parts = type(value), [self._rebuilder(part) for part in value]
            return lambda tensors: kind([part(tensors) for part in parts])
        return self._object_rebuilder(type(value), {name: self._rebuilder(part) for name, part in vars(value).items()})

    @staticmethod
    def _object_rebuilder(kind: type, fields: dict[str, Callable]) -> Callable[[list[Tensor]], Any]:
        def rebuild(tensors: list[Tensor]) -> Any:
            made = object.__new__(kind)  # its checks were passed by the first one
            made.__dict__.update([(name, field(tensors)) for name, field in fields.items()])
            return made

        return rebuild

    def _tensor_rebuilder(self, value: Tensor) -> Callable[[list[Tensor]], Tensor]:
        number, offset = self._place(value)
        owner = [*self._operands, *self.made][number]
        if owner is value:
            return lambda tensors: tensors[number]
        if owner.dtype is not value.dtype or offset % value.element_size():
            raise NotRepeatableError
        shape, stride, start = value.shape, value.stride(), offset // value.element_size()
        if start == 0 and owner.shape == shape and owner.stride() == stride:
            return lambda tensors: tensors[number]
        return lambda tensors: tensors[number].as_strided(shape, stride, tensors[number].storage_offset() + start)


def _extent(tensor: Tensor) -> int:
    """Bytes from its first element to the end of its last one."""
    if tensor.numel() == 0:
        return 0
    return (1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.element_size()


class _Launch:
    """One launch of a compiled kernel, but for the addresses."""

    def __init__(self, compiled: Any, grid: tuple[int, ...], values: list[Any], place: Callable[[Tensor], tuple[int, int]]) -> None:
        """values: the kernel's arguments in order, constants too, as Triton's launcher takes them."""
        self._run = compiled.run
        self._grid = (*grid, 1, 1)[:3]
        self._handle = (compiled.function, compiled.packed_metadata, None, None, None)
        self._values = list(values)
        self._pointers: list[tuple[int, int, int]] = []
        self._descriptors: list[tuple[int, int, type, dict[str, Any]]] = []
        for position, value in enumerate(values):
            if isinstance(value, Tensor):
                self._pointers.append((position, *place(value)))
                self._values[position] = None
            elif isinstance(getattr(value, "base", None), Tensor):
                owner, offset = place(value.base)
                if offset:
                    raise NotRepeatableError
                self._descriptors.append((position, owner, type(value), {**vars(value), "base": None}))
                self._values[position] = None

    def __call__(self, stream: int, tensors: list[Tensor], addresses: list[int]) -> None:
        values = self._values.copy()
        for position, owner, offset in self._pointers:
            values[position] = addresses[owner] + offset
        for position, owner, kind, fields in self._descriptors:
            # A new object for each launch: another thread may be launching the same.
            descriptor = values[position] = object.__new__(kind)
            descriptor.__dict__.update(fields)
            descriptor.base = tensors[owner]
        self._run(*self._grid, stream, *self._handle, *values)


def _stream_getter() -> Callable[[int], int]:
    """Device index -> handle of its current stream: Triton's, a microsecond faster than torch's."""
    from triton.runtime import driver

    return driver.active.get_current_stream


class Plan:
    """The allocations and launches of one layout."""

    def __init__(self, made: list[Tensor], launches: list[_Launch], rebuild: Callable[[list[Tensor]], Any], like: Tensor) -> None:
        self._empties = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in made]
        self._launches, self._rebuild, self._device = launches, rebuild, like.device
        self._stream_of = _stream_getter()

    def __call__(self, tensors: list[Tensor]) -> Any:
        device = self._device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(tensors)
        for shape, stride, dtype in self._empties:
            tensors.append(torch.empty_strided(shape, stride, dtype=dtype, device=device))
        addresses = [tensor.data_ptr() for tensor in tensors]
        stream = self._stream_of(device.index)
        for one in self._launches:
            one(stream, tensors, addresses)
        return self._rebuild(tensors)
