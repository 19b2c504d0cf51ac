"""What one call of an operation allocates, launches and has torch do: noted here, done again by plan.py. For repeat.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .driver_launch import Described, Launch, Place
from .plan import Call, Made, Plan, View
from .triton_launch import TritonLaunch

# What is the same in every call of one layout.
PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, FunctionType, BuiltinFunctionType})


class NotRepeatableError(Exception):
    """The call did something that a plan cannot do again."""


def launch_now(kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any]) -> Any:
    """kernel[grid](*arguments, **constants), also where Triton refuses the tensors. Returns the compiled kernel."""
    if torch.compiler.is_compiling() or not hides_addresses() or not torch.cuda.is_current_stream_capturing():
        return kernel[grid](*arguments, **constants)
    compiled, addresses = kernel.warmup(*arguments, grid=grid, **constants), []

    def place(tensor: Tensor) -> Place:
        addresses.append(tensor.data_ptr())
        return Place(len(addresses) - 1)

    one = TritonLaunch(_launch_of(compiled, kernel, grid, arguments, constants, place))
    one(torch.cuda.current_stream().cuda_stream, addresses)
    return compiled


@cache
def hides_addresses() -> bool:
    """Whether the driver does not know memory made while a CUDA graph is recorded, until the graph runs: cudaMallocAsync.

    Triton's launcher asks the driver about each tensor, and fails. Such memory cannot be freed outside of the graph either:
    a tensor of a recording that outlives it ends the process (torch 2.11).
    """
    return torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_allocator_backend() == "cudaMallocAsync"


def _launch_of(
    compiled: Any, kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any], place: Callable[[Tensor], Place]
) -> Launch:
    if compiled is None:  # the interpreter's
        raise NotRepeatableError
    values = []
    for value in (*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :])):
        if isinstance(value, Tensor):
            values.append(place(value))
        elif isinstance(getattr(value, "base", None), Tensor):
            values.append(Described(place(value.base), type(value), {**vars(value), "base": None}))
        else:
            values.append(value)
    return Launch(compiled, (*grid, 1, 1)[:3], tuple(values))


class Allocation:
    """A tensor that the call made. Not held: the first call of a transformer block would need three times the later ones' memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype, self.nbytes = tensor.shape, tensor.dtype, tensor.nbytes
        self._stride, self._address, self._extent = tensor.stride(), tensor.data_ptr(), _extent(tensor)
        self._storage = StorageWeakRef(tensor.untyped_storage())

    def stride(self) -> Sequence[int]:
        return self._stride

    def offset_of(self, address: int) -> int | None:
        """Bytes from its start; None if the address is outside, or this memory may be another tensor's by now."""
        offset = address - self._address
        return offset if 0 <= offset < self._extent and not self._storage.expired() else None


class _Allocations(list):
    def append(self, tensor: Tensor) -> None:
        super().append(Allocation(tensor))


class Recording:
    """What one call allocates (`made`), launches, and has torch do."""

    def __init__(self, operands: list[Tensor]) -> None:
        self.made: list = _Allocations()
        self._operands = operands
        self._steps: list[Launch | Call] | None = []
        self._uses: dict[int, dict[str, Any]] = {}  # number -> Made's fields

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any]) -> None:
        compiled = launch_now(kernel, grid, arguments, constants)
        self._note(lambda: _launch_of(compiled, kernel, grid, arguments, constants, self._place))

    def called(self, function: Callable[..., Tensor], tensors: Sequence[Tensor], result: Tensor) -> None:
        """result: what function(*tensors) was, a tensor with memory of its own."""
        self.made.append(result)
        number = len(self._operands) + len(self.made) - 1

        def call() -> Call:
            views = tuple(self._view(tensor, "is_given") for tensor in tensors)
            if self._place(result, "is_of_torch") != Place(number):
                raise NotRepeatableError
            return Call(function, views, number, result.shape, result.stride(), result.dtype)

        self._note(call)

    def plan(self, result: Any) -> Plan | None:
        """The call as a plan; None if it cannot be repeated."""
        if not self._steps:
            return None
        try:
            rebuild = self._rebuilder(result)
        except NotRepeatableError:
            return None
        operands = len(self._operands)
        made = [Made(tensor, **self._uses.get(number, {})) for number, tensor in enumerate(self.made, operands)]
        return Plan(self._steps, operands, made, rebuild, self._operands[0].device)

    def _note(self, step: Callable[[], Launch | Call]) -> None:
        if self._steps is None:
            return
        try:
            self._steps.append(step())
        except NotRepeatableError:
            self._steps = None

    def _place(self, tensor: Tensor, use: str | None = None) -> Place:
        """Where the tensor is. use: a field of Made that becomes true of it. Raises NotRepeatableError if the place is not certain."""
        address = tensor.data_ptr()
        inside = [
            Place(number, address - owner.data_ptr())
            for number, owner in enumerate(self._operands)
            if owner is tensor or owner.data_ptr() <= address < owner.data_ptr() + _extent(owner)
        ]
        offsets = [(number, one.offset_of(address)) for number, one in enumerate(self.made, len(self._operands))]
        inside += [Place(number, offset) for number, offset in offsets if offset is not None]
        if len(inside) != 1:
            raise NotRepeatableError
        step = len(self._steps or ())
        fields = self._uses.setdefault(inside[0].number, {"first": step})
        fields.update({"last": step} if use is None else {"last": step, use: True})
        return inside[0]

    def _view(self, tensor: Tensor, use: str) -> View:
        number, offset = self._place(tensor, use)
        owner = [*self._operands, *self.made][number]
        if owner.dtype is not tensor.dtype or offset % tensor.element_size():
            raise NotRepeatableError
        whole = owner is tensor or (offset == 0 and owner.shape == tensor.shape and owner.stride() == tensor.stride())
        return View(number, tensor.shape, tensor.stride(), offset // tensor.element_size(), whole)

    def _rebuilder(self, value: Any) -> Callable[[list[Tensor]], Any]:
        """A function that makes the same of other operands and allocations."""
        if isinstance(value, Tensor):
            return self._view(value, "is_returned").of
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


def _extent(tensor: Tensor) -> int:
    """Bytes from its first element to the end of its last one."""
    if tensor.numel() == 0:
        return 0
    return (1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.element_size()
