"""Device functions that turn float ratios into codes, shared by the quantize kernels."""

import triton
import triton.language as tl

# 1.5 * 2^23: adding it moves |x| < 2^22, rounded to the nearest integer with ties to even, into the low mantissa bits.
# libdevice.rint would do the same, but not in Triton's interpreter.
ROUND_MAGIC = tl.constexpr(12582912.0)
ROUND_MAGIC_BITS = tl.constexpr(0x4B400000)
# Beyond any code whatever the zero point; keeps infinite and huge ratios inside the range that ROUND_MAGIC rounds.
RATIO_LIMIT = tl.constexpr(1024.0)


@triton.jit
def round_half_even(ratio):
    """fp32 -> int32, ties to even; saturates at +-1024; NaN becomes 0."""
    ratio = tl.where(ratio == ratio, ratio, 0.0)
    ratio = tl.minimum(tl.maximum(ratio, -RATIO_LIMIT), RATIO_LIMIT)
    return (ratio + ROUND_MAGIC).to(tl.int32, bitcast=True) - ROUND_MAGIC_BITS


@triton.jit
def magnitude(x):
    """|x| as fp32, with NaN as infinity: tl.max would drop a NaN."""
    x = tl.abs(x.to(tl.float32))
    return tl.where(x == x, x, float("inf"))


@triton.jit
def dynamic_scale(absmax, TINY: tl.constexpr):
    """max(absmax, TINY) / 127, or NaN where absmax is infinite. div_rn: `/` is only accurate to 2 ulp."""
    scale = tl.div_rn(tl.maximum(absmax, TINY), 127.0)
    return tl.where(absmax < float("inf"), scale, float("nan"))
