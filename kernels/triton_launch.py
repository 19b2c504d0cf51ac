"""One launch of a compiled kernel through Triton's own launcher, but for the addresses: for what driver_launch.py does not take."""

from __future__ import annotations

from collections.abc import Sequence

from .driver_launch import Address, Described, Launch, Place


class TritonLaunch:
    """A launch that can be done again. 10 us of Python, the descriptors' included."""

    def __init__(self, launch: Launch) -> None:
        compiled = launch.compiled
        self._run = compiled.run
        self._grid = launch.grid
        self._handle = (compiled.function, compiled.packed_metadata, None, None, None)
        self._values = launch.values

    def __call__(self, stream: int, addresses: Sequence[int]) -> None:
        """addresses: of the plan's places."""
        self._run(*self._grid, stream, *self._handle, *(_with_address(value, addresses) for value in self._values))


def _with_address(value: object, addresses: Sequence[int]) -> object:
    if type(value) is Place:
        return addresses[value.number] + value.offset
    if type(value) is Described:
        # A new object for each launch: another thread may be launching the same.
        descriptor = object.__new__(value.kind)
        descriptor.__dict__.update(value.fields, base=Address(addresses[value.place.number] + value.place.offset))
        return descriptor
    return value
