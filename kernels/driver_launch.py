"""Launches compiled kernels through the CUDA driver from argument blocks that are made once: 1 to 2 us of Python instead of 10.

Triton's launcher takes each argument as a Python object, and encodes every tensor descriptor again. Here a block holds the
arguments as the kernel reads them; a repeated launch writes the new addresses into it. What a kernel reads is known from its
signature, and compared with what the driver says of it: where they differ, and for launches with attributes (clusters,
cooperative grids), Triton's own launcher is used (triton_launch.py). Knows addresses, no tensors.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from ..errors import HostError

# Triton's names of scalars, and how struct packs them. Each gets 8 bytes of its own.
SCALARS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp16": "e", "fp32": "f", "f32": "f", "fp64": "d", "f64": "d",
}  # fmt: skip
POINTER_BYTES, DESCRIPTOR_BYTES = 8, 128
# Encoded descriptors that an argument keeps: a weight's for each block of the UNet, and a few places of activations.
MOST_DESCRIPTORS = 256
# Of a compiled kernel's metadata; each asks for a launch attribute or for a workspace.
ATTRIBUTES = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size", "gsan")
NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: a thread that has not used this device yet


class Place(NamedTuple):
    """Bytes from the start of an operand or allocation, by its number in the plan."""

    number: int
    offset: int = 0


@dataclass(frozen=True)
class Described:
    """A tensor descriptor without its tensor. fields: of an object of this kind."""

    place: Place
    kind: type
    fields: dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """values: all of the kernel's arguments in order, constants too; a Place or Described for each tensor."""

    compiled: Any
    grid: tuple[int, int, int]
    values: tuple


class UnsupportedError(Exception):
    """Triton's own launcher must do this launch."""


class _Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = [(f"{what}_{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"] + [
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("number_of_attributes", ctypes.c_uint),
    ]


@cache
def driver() -> Any | None:
    """The CUDA driver's library; None where it or a function is missing (cuFuncGetParamInfo: before CUDA 12.4)."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
        library.cuFuncGetParamInfo.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
    except (OSError, AttributeError):
        return None
    return library


class DriverLaunches:
    """Launches in a row. Not for two threads at the same time: there is one block for each launch."""

    def __init__(self, launches: Sequence[Launch], library: Any | None) -> None:
        """Raises: UnsupportedError if Triton's launcher must do one of them."""
        if library is None:
            raise UnsupportedError
        self._launch = library.cuLaunchKernelEx
        self._numbers: list[int] = []
        try:
            blocks = [_Block(launch, self._index_of) for launch in launches]
        except AttributeError as error:  # no kernel of Triton's, or of a Triton that keeps its facts elsewhere
            raise UnsupportedError from error
        for block in blocks:
            block.check(list(_argument_sizes(library, block.function)))
        self._table = (ctypes.c_uint64 * len(self._numbers))()
        for block in blocks:
            block.point_into(self._table)
        self._blocks = blocks
        self._described = [(block.pointers, *entry) for block in blocks for entry in block.descriptors]
        self._calls = [(ctypes.addressof(one.config), one.function, ctypes.addressof(one.pointers), one.name) for one in blocks]
        self._pack = struct.Struct(f"={len(self._numbers)}Q").pack_into
        self._places = itemgetter(*self._numbers) if len(self._numbers) > 1 else lambda addresses: (addresses[self._numbers[0]],)
        self._known: tuple[int, ...] | None = None
        self._stream: int | None = None

    def __call__(self, stream: int, addresses: Sequence[int]) -> None:
        """addresses: of the plan's places."""
        now = self._places(addresses)
        if now != self._known:
            self._known = None  # until everything is written
            self._pack(self._table, 0, *now)
            for pointers, position, index, descriptors in self._described:
                pointers[position] = descriptors.encoded(now[index])
            self._known = now
        if stream != self._stream:
            for block in self._blocks:
                block.config.stream = stream
            self._stream = stream
        for config, function, pointers, name in self._calls:
            if status := self._launch(config, function, pointers, None):
                self._launch_again(status, config, function, pointers, name)

    def _launch_again(self, status: int, config: int, function: int, pointers: int, name: str) -> None:
        if status == NO_CONTEXT:
            torch.cuda.set_device(torch.cuda.current_device())
            status = self._launch(config, function, pointers, None)
        if status:
            raise HostError(f"{name}: CUDA error {status} at its launch; it must be 0. Restart the program: the GPU takes no more work.")

    def _index_of(self, place: Place) -> int:
        """Of an address in the table."""
        if place.offset:
            raise UnsupportedError
        if place.number not in self._numbers:
            self._numbers.append(place.number)
        return self._numbers.index(place.number)


class _Block:
    """Arguments of one launch: `pointers` has one to each, into the table of addresses, to a constant, or to a descriptor."""

    def __init__(self, launch: Launch, index_of: Any) -> None:
        compiled, metadata = launch.compiled, launch.compiled.metadata
        warps, clusters, shared = compiled.packed_metadata[:3]
        if clusters != 1 or 0 in launch.grid or any(getattr(metadata, name, 0) for name in ATTRIBUTES):
            raise UnsupportedError
        self.function, self.name = compiled.function, compiled.name
        self.config = _Config(*launch.grid, 32 * warps, 1, 1, shared)
        self.descriptors: list[tuple[int, int, _Descriptors]] = []
        self._sizes: list[int] = []
        self._in_table: dict[int, int] = {}
        self._constants: list[tuple[int, bytes]] = []
        types = tuple(compiled.src.signature.values())
        if len(types) != len(launch.values):
            raise UnsupportedError
        layouts = iter(getattr(metadata, "tensordesc_meta", None) or ())
        for kind, value in zip(types, launch.values, strict=True):
            if kind == "constexpr":
                continue
            if type(value) is Described:
                self._add_descriptor(value, next(layouts, None), index_of)
            elif type(value) is Place and kind[0] == "*":
                self._in_table[len(self._sizes)] = index_of(value)
                self._sizes.append(POINTER_BYTES)
            else:
                self._add_scalar(kind, value)

    def _add_scalar(self, kind: Any, value: Any) -> None:
        if kind not in SCALARS or not isinstance(value, int | float):
            raise UnsupportedError
        packed = struct.pack(f"={SCALARS[kind]}", value)
        self._constants.append((len(self._sizes), packed))
        self._sizes.append(len(packed))

    def _add_descriptor(self, value: Described, layout: Any, index_of: Any) -> None:
        self.descriptors.append((len(self._sizes), index_of(value.place), _Descriptors(value, layout)))
        self._sizes.append(DESCRIPTOR_BYTES)
        for kind, sizes in (("i32", value.fields["shape"]), ("i64", value.fields["strides"])):
            for size in sizes:
                self._add_scalar(kind, size)

    def check(self, sizes: Sequence[int]) -> None:
        """sizes: of all that the kernel reads. What comes after the arguments are pointers to workspaces of no bytes."""
        known = len(self._sizes)
        if list(sizes[:known]) != self._sizes or any(size != POINTER_BYTES for size in sizes[known:]):
            raise UnsupportedError
        self.pointers = (ctypes.c_void_p * max(1, len(sizes)))()
        self._values = (ctypes.c_uint64 * (len(self._constants) + 1))()  # the last one stays 0
        first = ctypes.addressof(self._values)
        for index, (position, packed) in enumerate(self._constants):
            ctypes.memmove(first + 8 * index, packed, len(packed))
            self.pointers[position] = first + 8 * index
        for position in range(known, len(sizes)):
            self.pointers[position] = first + 8 * len(self._constants)

    def point_into(self, table: ctypes.Array) -> None:
        for position, index in self._in_table.items():
            self.pointers[position] = ctypes.addressof(table) + 8 * index


class _Descriptors:
    """One argument's tensor descriptor, encoded by Triton once for each address: nothing else of it changes."""

    def __init__(self, described: Described, layout: Any) -> None:
        if layout is None:  # passed to the kernel some other way
            raise UnsupportedError
        self._described, self._layout = described, layout
        self._known: dict[int, tuple[int, object]] = {}

    def encoded(self, address: int) -> int:
        """Where the descriptor of what lies at this address is."""
        if (known := self._known.get(address)) is None:
            if len(self._known) >= MOST_DESCRIPTORS:
                self._known.clear()
            made = self._encode(address)
            # It is the last part of Triton's object for it.
            known = self._known[address] = (id(made) + type(made).__basicsize__ - DESCRIPTOR_BYTES, made)
        return known[0]

    def _encode(self, address: int) -> object:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        described = object.__new__(self._described.kind)
        described.__dict__.update(self._described.fields, base=Address(address))
        more = (None,) * (make_tensordesc_arg.__code__.co_argcount - 2)  # Triton 3.9 passes one more, which it does not use
        made, *_ = make_tensordesc_arg(described, self._layout, *more)
        return made


class Address:
    """Stands in for a tensor where a launcher reads its address and no more."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def _argument_sizes(library: Any, function: int) -> Iterator[int]:
    """Bytes of each argument that the kernel reads, as the driver knows it."""
    offset, size, index = ctypes.c_size_t(), ctypes.c_size_t(), 0
    while library.cuFuncGetParamInfo(function, index, ctypes.addressof(offset), ctypes.addressof(size)) == 0:
        yield size.value
        index += 1
