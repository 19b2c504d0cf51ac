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


def is_even(length: int) -> bool:
    """Whether loads and stores need no masks: both parts are full, and so is the program's block of rows."""
    return length == sum(split_row(length)) and rows_per_program(length) == 1


def neighbours(length: int) -> int:
    """How many neighbouring values a thread has of either part, as VECTOR: 8 at 1280, 4 at 640.

    Left to itself Triton takes as many as fill 16 bytes of what is loaded or stored, 8 or 16: then every part and every
    type has a layout of its own, and a third of the instructions exchange values between threads.
    """
    tail = split_row(length)[1] * rows_per_program(length)
    return max(1, min(8, tail // (32 * row_warps(length))))


@triton.jit
def load_parts(row_ptr, length, inside, HEAD: tl.constexpr, TAIL: tl.constexpr, EVEN: tl.constexpr = False, VECTOR: tl.constexpr = 8):
    """Both parts in their own type, 0 outside. row_ptr: (rows, 1) pointers to contiguous values. inside: (rows, 1).

    EVEN, VECTOR: see is_even and neighbours.
    """
    head_ptr = tl.max_contiguous(row_ptr + tl.arange(0, HEAD)[None, :], (1, VECTOR))
    tail_ptr = tl.max_contiguous(row_ptr + HEAD + tl.arange(0, TAIL)[None, :], (1, VECTOR))
    if EVEN:
        head = tl.load(head_ptr)
        tail = tl.load(tail_ptr)
    else:
        head = tl.load(head_ptr, mask=inside, other=0.0)
        tail = tl.load(tail_ptr, mask=inside & (tl.arange(0, TAIL)[None, :] < length - HEAD), other=0.0)
    return head, tail


@triton.jit
def load_row(row_ptr, length, inside, HEAD: tl.constexpr, TAIL: tl.constexpr, EVEN: tl.constexpr = False, VECTOR: tl.constexpr = 8):
    """As load_parts, as fp32."""
    head, tail = load_parts(row_ptr, length, inside, HEAD, TAIL, EVEN, VECTOR)
    return head.to(tl.float32), tail.to(tl.float32)


@triton.jit
def load_vector(vector_ptr, length, HEAD: tl.constexpr, TAIL: tl.constexpr, EVEN: tl.constexpr = False, VECTOR: tl.constexpr = 8):
    """Both parts of a vector shared by all rows, as fp32 (1, HEAD) and (1, TAIL)."""
    return load_row(vector_ptr, length, tl.full((1, 1), 1, tl.int1), HEAD, TAIL, EVEN, VECTOR)


@triton.jit
def store_row(
    row_ptr, length, inside, head, tail, HEAD: tl.constexpr, TAIL: tl.constexpr, EVEN: tl.constexpr = False, VECTOR: tl.constexpr = 8
):
    """Both parts, converted to the pointer's type."""
    head_ptr = tl.max_contiguous(row_ptr + tl.arange(0, HEAD)[None, :], (1, VECTOR))
    tail_ptr = tl.max_contiguous(row_ptr + HEAD + tl.arange(0, TAIL)[None, :], (1, VECTOR))
    head, tail = head.to(row_ptr.dtype.element_ty), tail.to(row_ptr.dtype.element_ty)
    if EVEN:
        tl.store(head_ptr, head)
        tl.store(tail_ptr, tail)
    else:
        tl.store(head_ptr, head, mask=inside)
        tl.store(tail_ptr, tail, mask=inside & (tl.arange(0, TAIL)[None, :] < length - HEAD))
