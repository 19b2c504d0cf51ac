"""Device functions of the kernels that only read, scale and write: instructions per value decide their speed, so there are few.

A 1280-wide row takes 11 sm_90 instructions per value in quantize_token and 18 in layer_norm_quantize; with rounding.py's and
encoding.py's functions, whose formulas these are, it took 32 and 30.
"""

import torch
import triton
import triton.language as tl

from .rounding import INTERPRETED, ROUND_MAGIC, magnitude, nearest_fp8, round_half_even

HAS_PTX = tl.constexpr(not INTERPRETED.value and torch.version.hip is None)
# Four fp32 to four int8 in one register, saturating, NaN to 0: two instructions (F2IP) from sm_80 on.
PACK_ASM = tl.constexpr(
    "{.reg .b32 a, b, c, d; cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $2; cvt.rni.s32.f32 c, $3; cvt.rni.s32.f32 d, $4; "
    "cvt.pack.sat.s8.s32.b32 c, d, c, 0; cvt.pack.sat.s8.s32.b32 $0, b, a, c;}"
)
PACK_CONSTRAINTS = tl.constexpr("=r,r,r,r,r")


@triton.jit
def larger(a, b):
    """The larger one; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_absmax(head, tail):
    """fp32 max |x| over both parts of every row (row_parts.py); NaN or infinite if any value is. fp16 is compared as such."""
    if head.dtype == tl.bfloat16:  # whose maximum Triton gives as fp32, which a reduction does not bear
        head, tail = head.to(tl.float32), tail.to(tl.float32)
    if INTERPRETED:  # which calls Python for every value of a reduction with a function of ours
        absmax = tl.maximum(tl.max(magnitude(head), axis=1), tl.max(magnitude(tail), axis=1))
    else:
        absmax = larger(tl.reduce(tl.abs(head), 1, larger), tl.reduce(tl.abs(tail), 1, larger)).to(tl.float32)
    return absmax


@triton.jit
def absmax_of_tiles(tiles):
    """(rows, 1) fp32 max |x| of rows held as tiles (row_tiles.py); NaN or infinite if any value is. fp16 is compared as such."""
    if INTERPRETED:  # see row_absmax
        absmax = magnitude(tiles[0])
        for i in tl.static_range(1, len(tiles)):
            absmax = tl.maximum(absmax, magnitude(tiles[i]))
        absmax = tl.max(absmax, axis=1, keep_dims=True)
    else:
        absmax = _absolute(tiles[0])
        for i in tl.static_range(1, len(tiles)):
            absmax = larger(absmax, _absolute(tiles[i]))
        absmax = tl.reduce(absmax, 1, larger, keep_dims=True).to(tl.float32)
    return absmax


@triton.jit
def _absolute(x):
    """|x|; fp32 of bfloat16, whose maximum Triton gives as fp32, which a reduction does not bear."""
    return tl.abs(x.to(tl.float32) if x.dtype == tl.bfloat16 else x)


@triton.jit
def divided(x, scale, inverse):
    """x / scale, rounded correctly: inverse is 1 / scale, or 0 for a scale that is not finite, which gives NaN or 0.

    One Newton step (Markstein, IBM J. Res. Dev. 34, 1990) in 3 instructions. Finite x, |x / scale| far from overflow.
    """
    if INTERPRETED:  # its fma rounds twice
        ratio = tl.where(inverse == 0.0, x * 0.0, tl.div_rn(x, tl.broadcast_to(scale, x.shape)))
    else:
        ratio = x * inverse
        ratio = tl.fma(tl.fma(-ratio, scale, x), inverse, ratio)
    return ratio


@triton.jit
def pack_codes(ratio, CODES: tl.constexpr):
    """fp32 -> the nearest int8, ties to even, saturating at -128 and 127; or e4m3 (rounding.nearest_fp8). NaN becomes 0."""
    if tl.float8e4nv == CODES:
        codes = nearest_fp8(ratio)
    elif HAS_PTX:
        codes = tl.inline_asm_elementwise(PACK_ASM, PACK_CONSTRAINTS, [ratio], dtype=tl.int8, is_pure=True, pack=4)
    else:
        codes = tl.minimum(tl.maximum(round_half_even(ratio), -128), 127).to(tl.int8)
    return codes


@triton.jit
def shifted_ratio(ratio, zero_point, HAS_ZERO_POINT: tl.constexpr):
    """What pack_codes makes a stored scale's code of: whole numbers with the zero point added, or at least -127 without one.

    In floats: adding ROUND_MAGIC rounds, and what is too large to be rounded saturates all the same. NaN stays NaN.
    """
    if HAS_ZERO_POINT:
        rounded = ratio + ROUND_MAGIC
        ratio = rounded + (zero_point.to(tl.float32) - ROUND_MAGIC)
    else:
        ratio = larger(ratio, -127.0)
    return ratio
