"""Device functions with which a producer quantizes what it has in registers: its scale, and its codes."""

import triton
import triton.language as tl

from .rounding import ROUND_MAGIC, nearest_fp8


@triton.jit
def reciprocal(scale):
    """1 / scale; 0 for a scale of NaN, so that codes become 0."""
    return tl.where(scale == scale, tl.div_rn(1.0, scale), 0.0)


@triton.jit
def encode(y, inverse, zero_point, HAS_ZERO_POINT: tl.constexpr, CODES: tl.constexpr = tl.int8):
    """fp32 y -> int8 clamp(round(y * inverse) + zero_point), ties to even, [-127, 127] without a zero point; NaN becomes 0.

    CODES fp8: y * inverse rounded to e4m3, no zero point.

    y * inverse where the references divide: a tenth of the instructions, and one code in 10^5 is another neighbour.
    The clamp comes first, at whole numbers, which is the same; then the low byte of the magic sum is the code.
    """
    ratio = y * inverse
    if tl.float8e4nv == CODES:
        codes = nearest_fp8(ratio)
    elif HAS_ZERO_POINT:
        ratio = tl.where(ratio == ratio, ratio, 0.0)
        lowest = (-128 - zero_point).to(tl.float32)
        highest = (127 - zero_point).to(tl.float32)
        ratio = tl.minimum(tl.maximum(ratio, lowest), highest)
        codes = ((ratio + ROUND_MAGIC).to(tl.int32, bitcast=True) + zero_point).to(tl.int8)
    else:
        ratio = tl.where(ratio == ratio, ratio, 0.0)
        ratio = tl.minimum(tl.maximum(ratio, -127.0), 127.0)
        codes = (ratio + ROUND_MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    return codes


@triton.jit
def static_entry(table_ptr, zero_table_ptr, bucket_ptr, scale_ptr, zero_point_ptr, entry, inside, first, HAS_ZERO_POINT: tl.constexpr):
    """Scale and zero point of sample `entry`; where `first`, stored for the consumer too, which saves two look-up kernels."""
    bucket = tl.load(bucket_ptr + entry, mask=inside, other=0)
    scale = tl.load(table_ptr + bucket, mask=inside, other=1.0)
    tl.store(scale_ptr + entry, scale, mask=first)
    zero_point = bucket.to(tl.int32) * 0  # tl.zeros_like has no layout in Gluon
    if HAS_ZERO_POINT:
        zero_point = tl.load(zero_table_ptr + bucket, mask=inside, other=0)
        tl.store(zero_point_ptr + entry, zero_point, mask=first)
    return scale, zero_point
