"""Device functions that count what clamping to the codes' range changed. Who reads the counts: hosts/comfy/saturation.py."""

import triton
import triton.language as tl


@triton.jit
def beyond_codes(y, inverse, zero_point, HAS_ZERO_POINT: tl.constexpr):
    """Where encoding.encode clamps; not where y is NaN. A value between the last code and half a step beyond it is not clamped."""
    ratio = y * inverse
    if HAS_ZERO_POINT:
        lowest = (-128 - zero_point).to(tl.float32) - 0.5
        highest = (127 - zero_point).to(tl.float32) + 0.5
    else:
        lowest = -127.5
        highest = 127.5
    return (ratio < lowest) | (ratio > highest)


@triton.jit
def count(tile):
    """How many of a two-dimensional tile's booleans are true."""
    return tl.sum(tl.sum(tile.to(tl.int32), axis=1), axis=0)


@triton.jit
def add_clipped(clipped_ptr, clipped, rows, is_first):
    """Add one program's clipped values, if there are any; the first program also adds the rows of the whole launch."""
    tl.atomic_add(clipped_ptr, clipped, mask=clipped > 0, sem="relaxed")
    tl.atomic_add(clipped_ptr + 1, rows, mask=is_first, sem="relaxed")
