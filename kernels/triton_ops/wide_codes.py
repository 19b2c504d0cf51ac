"""Device functions that round to 16-bit codes and split them into two int8 planes. Formula: ../quantize_wide.py."""

import triton
import triton.language as tl

from .rounding import ROUND_MAGIC, ROUND_MAGIC_BITS

LARGEST = tl.constexpr(32512.0)


@triton.jit
def wide_scale(absmax, TINY: tl.constexpr):
    """max(absmax, TINY) / 32512, the low plane's; NaN where absmax is infinite."""
    scale = tl.div_rn(tl.maximum(absmax, TINY), LARGEST)
    return tl.where(absmax < float("inf"), scale, float("nan"))


@triton.jit
def planes(ratio):
    """fp32 x / scale -> (high, low) int8: ratio to the nearest whole number, ties to even, is 256 * high + low. NaN becomes 0."""
    ratio = tl.where(ratio == ratio, ratio, 0.0)
    ratio = tl.minimum(tl.maximum(ratio, -LARGEST), LARGEST)
    codes = (ratio + ROUND_MAGIC).to(tl.int32, bitcast=True) - ROUND_MAGIC_BITS
    high = (codes + 128) >> 8
    return high.to(tl.int8), codes.to(tl.int8)  # the low byte, with its sign, is codes - 256 * high
