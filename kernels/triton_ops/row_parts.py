"""A row held in registers as two power-of-two parts. SDXL's widths are 5 * 2^n = 4 * 2^n + 2^n: one part would idle 3 lanes of 8."""

from __future__ import annotations

import triton
import triton.language as tl

# Values of a row per thread: fewer warps need fewer instructions (29 a value for 1280 in 1 warp, 42 in 2), and 40 fit in registers.
VALUES_PER_THREAD = 40
MAX_WARPS = 8
# Short rows share a program, which then has about this many values.
VALUES_PER_PROGRAM = 512


def split_row(length: int) -> tuple[int, int]:
    """(HEAD, TAIL): powers of two with HEAD < length <= HEAD + TAIL, HEAD as large as can be.

    1280 -> (1024, 256), 77 -> (64, 16), 64 -> (32, 32). A length of 1 has an empty tail of one masked lane.
    """
    if length == 1:
        return 1, 1
    head = 1 << ((length - 1).bit_length() - 1)
    return head, triton.next_power_of_2(length - head)


def row_warps(length: int) -> int:
    """Warps for one row: 1 up to 1280 values, 4 at 5120."""
    return min(MAX_WARPS, triton.next_power_of_2(-(-length // (32 * VALUES_PER_THREAD))))


def rows_per_program(length: int) -> int:
    """A power of two; 1 from 512 values on."""
    return max(1, VALUES_PER_PROGRAM // triton.next_power_of_2(length))


@triton.jit
def load_row(row_ptr, length, inside, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Both parts as fp32, 0 outside. row_ptr: (rows, 1) pointers to contiguous values. inside: (rows, 1)."""
    head = tl.load(row_ptr + tl.arange(0, HEAD)[None, :], mask=inside, other=0.0)
    in_tail = inside & (tl.arange(0, TAIL)[None, :] < length - HEAD)
    tail = tl.load(row_ptr + HEAD + tl.arange(0, TAIL)[None, :], mask=in_tail, other=0.0)
    return head.to(tl.float32), tail.to(tl.float32)


@triton.jit
def load_vector(vector_ptr, length, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Both parts of a vector shared by all rows, as fp32 (1, HEAD) and (1, TAIL)."""
    head = tl.load(vector_ptr + tl.arange(0, HEAD))
    tail = tl.load(vector_ptr + HEAD + tl.arange(0, TAIL), mask=tl.arange(0, TAIL) < length - HEAD, other=0.0)
    return head.to(tl.float32)[None, :], tail.to(tl.float32)[None, :]


@triton.jit
def store_row(row_ptr, length, inside, head, tail, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Both parts, converted to the pointer's type."""
    tl.store(row_ptr + tl.arange(0, HEAD)[None, :], head.to(row_ptr.dtype.element_ty), mask=inside)
    in_tail = inside & (tl.arange(0, TAIL)[None, :] < length - HEAD)
    tl.store(row_ptr + HEAD + tl.arange(0, TAIL)[None, :], tail.to(row_ptr.dtype.element_ty), mask=in_tail)
