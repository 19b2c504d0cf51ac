"""Device functions that count what clamping to the codes' range changed. Who reads the counts: hosts/comfy/saturation.py."""

import triton
import triton.language as tl

from .packed_codes import larger
from .rounding import INTERPRETED, magnitude


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


@triton.jit
def count_beyond(ratio, inside, zero_point, HAS_ZERO_POINT: tl.constexpr):
    """How many of a two-dimensional tile's ratios (y * inverse) the codes' range clamps, where counting takes longer than all the rest.

    Nearly always there is none, which one maximum says: of the distance to the middle of the range.
    """
    reach: tl.constexpr = 128.0 if HAS_ZERO_POINT else 127.5
    distance = _from_middle(ratio, zero_point, HAS_ZERO_POINT)
    clipped = 0
    if tl.max(tl.max(distance, axis=1), axis=0) > reach:
        clipped = count(inside & (distance > reach))
    return clipped


@triton.jit
def count_beyond_and_nan(ratio, inside, zero_point, HAS_ZERO_POINT: tl.constexpr):
    """count_beyond, and the ratios with 0 for NaN: the same maximum says whether there is one, where each value was asked twice."""
    reach: tl.constexpr = 128.0 if HAS_ZERO_POINT else 127.5
    distance = _from_middle(ratio, zero_point, HAS_ZERO_POINT)
    if INTERPRETED:  # which calls Python for every value of a reduction with a function of ours
        rows = tl.max(magnitude(distance), axis=1)
        largest = tl.max(rows, axis=0)
    else:
        rows = tl.reduce(distance, 1, larger)
        largest = tl.reduce(rows, 0, larger)
    clipped = 0
    if not (largest <= reach):
        clipped = count(inside & (distance > reach))
        ratio = tl.where(ratio == ratio, ratio, 0.0)
    return clipped, ratio


@triton.jit
def _from_middle(ratio, zero_point, HAS_ZERO_POINT: tl.constexpr):
    """How far each ratio is from the middle of the codes' range."""
    middle = -0.5 - zero_point.to(tl.float32) if HAS_ZERO_POINT else 0.0
    return tl.abs(ratio - middle)
