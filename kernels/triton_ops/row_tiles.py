"""Rows held in registers as up to five equal tiles of a power-of-two width: SDXL's widths are 5 * 2^n. Neighbouring values per thread: 8.

Where row_parts.py gives a row of 640 a warp of its own and 8 bytes to a load, here two rows share a warp and every load has 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

MOST_TILES = 5  # 40 values a thread
VECTOR = tl.constexpr(8)  # 16 bytes of what is loaded
LANES = 32 * 8  # values of a tile that one warp holds
SHARED_WARPS = 4  # of a program whose rows share warps; measured on an H100 at 640: 4.8 us where one warp takes 5.3


def split_tiles(length: int) -> tuple[int, int]:
    """(TILES, WIDTH): TILES * WIDTH >= length. 1280 -> (5, 256), 640 -> (5, 128), 77 -> (5, 16), 64 -> (4, 16)."""
    width = triton.next_power_of_2(-(-length // MOST_TILES))
    return -(-length // width), width


def rows_of_program(rows: int, width: int) -> int:
    """One row, or as many short ones as SHARED_WARPS warps hold: a power of two that divides `rows`, so that none is outside."""
    return 1 if width >= LANES else max(1, min(SHARED_WARPS * LANES // width, rows & -rows))


def warps_of_program(rows: int, width: int) -> int:
    """Warps for so many rows of tiles of this width."""
    return max(1, rows * width // LANES)


@triton.jit
def load_tiles(row_ptr, length, TILES: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Tiles (rows, WIDTH) in their own type, 0 outside. row_ptr: (rows, 1) pointers to contiguous values. EVEN: nothing is outside."""
    tiles = ()
    for i in tl.static_range(TILES):
        columns = i * WIDTH + tl.arange(0, WIDTH)[None, :]
        ptrs = tl.max_contiguous(row_ptr + columns, (1, VECTOR))
        tile = tl.load(ptrs) if EVEN else tl.load(ptrs, mask=columns < length, other=0.0)
        tiles = tiles + (tile,)  # noqa: RUF005 - Triton's compiler does not unpack
    return tiles


@triton.jit
def store_tile(row_ptr, length, tile, i: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Tile i of every row."""
    columns = i * WIDTH + tl.arange(0, WIDTH)[None, :]
    ptrs = tl.max_contiguous(row_ptr + columns, (1, VECTOR))
    if EVEN:
        tl.store(ptrs, tile)
    else:
        tl.store(ptrs, tile, mask=columns < length)
