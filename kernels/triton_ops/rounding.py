"""Device functions that turn float ratios into codes, shared by the quantize kernels."""

import os

import triton
import triton.language as tl

# Triton's interpreter loses the carry of a mantissa that rounds up to the next power of two (3.9: 124.6 becomes 64).
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
FP8_MAX = tl.constexpr(448.0)

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
def nearest_fp8(ratio):
    """fp32 -> e4m3, ties to even; saturates at +-448; NaN becomes 0."""
    ratio = tl.where(ratio == ratio, ratio, 0.0)
    if INTERPRETED:  # GPUs saturate by themselves; rounded in fp32 first: to 3 bits of mantissa, or to multiples of 2^-9 below 2^-6
        ratio = tl.minimum(tl.maximum(ratio, -FP8_MAX), FP8_MAX)
        bits = ratio.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        ratio = tl.where(tl.abs(ratio) < 0.015625, (ratio + 24576.0) - 24576.0, normal)
    return ratio.to(tl.float8e4nv)


@triton.jit
def nearest_code(ratio, CODES: tl.constexpr):
    """fp32 -> a code of type CODES: int32 of round_half_even, or e4m3."""
    if tl.float8e4nv == CODES:
        return nearest_fp8(ratio)
    else:
        return round_half_even(ratio)


@triton.jit
def magnitude(x):
    """|x| as fp32, with NaN as infinity: tl.max would drop a NaN."""
    x = tl.abs(x.to(tl.float32))
    return tl.where(x == x, x, float("inf"))


@triton.jit
def upper(x):
    """x as fp32, with NaN and -infinity as infinity: tl.max would drop them."""
    x = x.to(tl.float32)
    return tl.where(tl.abs(x) < float("inf"), x, float("inf"))


@triton.jit
def dynamic_scale(absmax, TINY: tl.constexpr, CODES: tl.constexpr = tl.int8):
    """max(absmax, TINY) / 127, of fp8 codes / 448; NaN where absmax is infinite. div_rn: `/` is only accurate to 2 ulp."""
    LARGEST: tl.constexpr = FP8_MAX if tl.float8e4nv == CODES else 127.0
    scale = tl.div_rn(tl.maximum(absmax, TINY), LARGEST)
    return tl.where(absmax < float("inf"), scale, float("nan"))


@triton.jit
def range_scale(high, LOW: tl.constexpr):
    """Scale and zero point of [LOW, high], high >= 0: see ../quantize_image.py. NaN and 0 where high is infinite."""
    scale = tl.div_rn(high - LOW, 255.0)
    zero_point = round_half_even(tl.div_rn(-LOW, scale)) - 128
    finite = high < float("inf")
    return tl.where(finite, scale, float("nan")), tl.where(finite, zero_point, 0)
