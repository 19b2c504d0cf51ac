"""Does again what recording.py noted, with other tensors: allocates, launches, calls torch, and puts the result together.

What the caller does not see of a call's memory is one allocation, in which parts that are not needed at the same time overlap.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .driver_launch import Described, DriverLaunches, Launch, Place, UnsupportedError, driver
from .triton_launch import TritonLaunch

# What torch's own allocator gives every tensor; tensor descriptors need 128.
ALIGNMENT = 512


class View(NamedTuple):
    """A tensor that is tensor `number` of the plan, or lies in it. start: elements from its first one. whole: it is that tensor."""

    number: int
    shape: Sequence[int]
    stride: Sequence[int]
    start: int
    whole: bool

    def of(self, tensors: list) -> Tensor:
        tensor = tensors[self.number]
        return tensor if self.whole else tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.start)


@dataclass(frozen=True)
class Call:
    """A torch function of some tensors, and what it gave: a new tensor, number `number` of the plan."""

    function: Callable[..., Tensor]
    views: tuple[View, ...]
    number: int
    shape: Sequence[int]
    stride: Sequence[int]
    dtype: torch.dtype

    def __call__(self, tensors: list) -> Tensor:
        made = self.function(*[view.of(tensors) for view in self.views])
        if made.stride() == self.stride:
            return made
        # Another algorithm of torch's, with another layout: launches after this one know the first one's.
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=made.device).copy_(made)


@dataclass(frozen=True)
class Made:
    """An allocation of the call.

    first, last: steps that use it; the step after the last one is the putting together. None if none does.
    is_returned: whether the caller is given it. is_given: whether torch is. is_of_torch: whether a Call made it.
    """

    tensor: Tensor
    first: int | None = None
    last: int | None = None
    is_returned: bool = False
    is_given: bool = False
    is_of_torch: bool = False


@dataclass(frozen=True)
class _Segment:
    """allocate: (number, shape, stride, dtype). launches: called with stream and addresses. call: the torch function after them, if any.

    free: numbers that nobody needs after that.
    """

    allocate: tuple[tuple[int, Sequence[int], Sequence[int], torch.dtype], ...]
    launches: tuple[Callable[[int, Sequence[int]], None], ...]
    call: Call | None
    free: tuple[int, ...]


class Plan:
    """The steps of one layout. Threads that want the same plan wait for each other: its argument blocks exist once.

    Tensors are numbered: operands first, then allocations in their order, then the scratch memory, in which most of these lie.
    After the allocations, addresses has what launches are given parts of.
    """

    def __init__(
        self, steps: Sequence[Launch | Call], operands: int, made: Sequence[Made], rebuild: Callable[[list], Any], device: torch.device
    ) -> None:
        self._rebuild, self._device = rebuild, device
        self._lock, self._stream_of = threading.Lock(), _stream_getter()
        self._scratch_dtype = next((one.tensor.dtype for one in made if one.is_given and _is_inner(one)), torch.uint8)
        inner = [_is_inner(one) and (not one.is_given or one.tensor.dtype is self._scratch_dtype) for one in made]
        self._offsets, scratch_bytes = _packed(made, inner)
        self._scratch_elements = scratch_bytes // self._scratch_dtype.itemsize
        self._first_part, self._parts = operands + len(made), []
        self._inner = {operands + index: self._offsets[index] for index, is_inner in enumerate(inner) if is_inner}
        own = {number: one for number, one in enumerate(made, operands) if one.first is not None and number not in self._inner}
        ends = {one.last + 1 for one in own.values()} | {index + 1 for index, step in enumerate(steps) if isinstance(step, Call)}
        self._segments = [self._segment(steps, start, end, own) for start, end in pairwise(sorted(ends | {0, len(steps) + 1}))]

    def __call__(self, tensors: list, addresses: list[int]) -> Any:
        """tensors, addresses: of the operands; both lists are used up."""
        device = self._device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(tensors, addresses)
        with self._lock:
            return self._repeat(tensors, addresses)

    def _repeat(self, tensors: list, addresses: list[int]) -> Any:
        device, stream = self._device, self._stream_of(self._device.index)
        scratch = torch.empty(self._scratch_elements, dtype=self._scratch_dtype, device=device) if self._scratch_elements else None
        start = 0 if scratch is None else scratch.data_ptr()
        tensors += [None] * len(self._offsets)
        tensors.append(scratch)
        addresses += [start + offset for offset in self._offsets]
        addresses += [0] * len(self._parts)
        for segment in self._segments:
            for number, shape, stride, dtype in segment.allocate:
                tensors[number] = torch.empty_strided(shape, stride, dtype=dtype, device=device)
                addresses[number] = tensors[number].data_ptr()
            for index, (number, offset) in enumerate(self._parts, self._first_part):
                addresses[index] = addresses[number] + offset
            for launch in segment.launches:
                launch(stream, addresses)
            if (call := segment.call) is not None:
                tensors[call.number] = call(tensors)
                addresses[call.number] = tensors[call.number].data_ptr()
            for number in segment.free:
                tensors[number] = None
        return self._rebuild(tensors)

    def _segment(self, steps: Sequence[Launch | Call], start: int, end: int, own: dict[int, Made]) -> _Segment:
        """Of the steps from start up to end: of these, only the last one can be a call, and be the last to use a tensor."""
        made = {number: one for number, one in own.items() if start <= one.first < end and not one.is_of_torch}
        allocate = tuple((number, one.tensor.shape, one.tensor.stride(), one.tensor.dtype) for number, one in made.items())
        launches = [self._without_parts(step) for step in steps[start:end] if isinstance(step, Launch)]
        call = next((self._in_scratch(step) for step in steps[start:end] if isinstance(step, Call)), None)
        free = tuple(number for number, one in own.items() if one.last == end - 1 < len(steps))
        return _Segment(allocate, tuple(_launchers(launches)), call, free)

    def _in_scratch(self, call: Call) -> Call:
        """With views into the scratch memory for what lies there."""

        def moved(view: View) -> View:
            if view.number not in self._inner:
                return view
            start = view.start + self._inner[view.number] // self._scratch_dtype.itemsize
            return View(self._first_part, view.shape, view.stride, start, False)

        return replace(call, views=tuple(map(moved, call.views)))

    def _without_parts(self, launch: Launch) -> Launch:
        """With a number of its own for everything that does not start where an operand or allocation does."""

        def whole(value: Any) -> Any:
            if type(value) is Described:
                return replace(value, place=whole(value.place))
            if type(value) is not Place or not value.offset:
                return value
            if value not in self._parts:
                self._parts.append(value)
            return Place(self._first_part + self._parts.index(value))

        return replace(launch, values=tuple(map(whole, launch.values)))


def _launchers(launches: list[Launch]) -> list[Callable[[int, Sequence[int]], None]]:
    """As few as possible, in order."""
    if not launches:
        return []
    try:
        return [DriverLaunches(launches, driver())]
    except UnsupportedError:
        if len(launches) == 1:
            return [TritonLaunch(launches[0])]
    half = len(launches) // 2
    return _launchers(launches[:half]) + _launchers(launches[half:])


def _is_inner(made: Made) -> bool:
    """Whether nobody outside of the call ever sees it."""
    return made.first is not None and not made.is_returned and not made.is_of_torch


def _packed(made: Sequence[Made], inner: Sequence[bool]) -> tuple[list[int], int]:
    """Where in one allocation each of the inner ones goes, 0 for others; and its bytes. The largest find a place first."""
    offsets, placed = [0] * len(made), []
    for index in sorted((index for index, is_inner in enumerate(inner) if is_inner), key=lambda index: -made[index].tensor.nbytes):
        one, start = made[index], 0
        size = -(-one.tensor.nbytes // ALIGNMENT) * ALIGNMENT
        for other_start, other_end, other in sorted(placed, key=lambda other: other[0]):
            at_the_same_time = other.first <= one.last and one.first <= other.last
            if at_the_same_time and start + size > other_start:
                start = max(start, other_end)
        offsets[index] = start
        placed.append((start, start + size, one))
    return offsets, max((end for _, end, _ in placed), default=0)


def _stream_getter() -> Callable[[int], int]:
    """Device index -> handle of its current stream: Triton's, a microsecond faster than torch's."""
    from triton.runtime import driver

    return driver.active.get_current_stream
