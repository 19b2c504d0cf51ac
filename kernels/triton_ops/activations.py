"""Device functions of the UNet's activations, SiLU and erf-GELU, in fp32. For every kernel that ends in one."""

import triton
import triton.language as tl

from .. import group_norm_silu_quantize as reference
from .packed_codes import HAS_PTX

LOG2_E = tl.constexpr(1.4426950408889634)
# -log2(e) and 1. Subnormal sums and reciprocals become 0, which is right to 1e-36; Triton's own functions scale them first.
SILU_ASM = tl.constexpr(
    "{.reg .f32 a; mul.f32 a, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 a, a; "
    "add.f32 a, a, 0f3F800000; rcp.approx.ftz.f32 a, a; mul.f32 $0, $1, a;}"
)
SILU_DIP = tl.constexpr(reference.SILU_DIP)
SILU_DIP_DEPTH = tl.constexpr(reference.SILU_DIP_DEPTH)
# Beyond it GELU is 0 or x to 1.1e-7, less than two of fp16's smallest steps.
GELU_REACH = tl.constexpr(5.5)


@triton.jit
def silu(x):
    """x / (1 + exp(-x)); NaN for -inf. 5 instructions; without PTX's own the root's reciprocal squared, 8; with tl.sigmoid 14."""
    if HAS_PTX:
        y = tl.inline_asm_elementwise(SILU_ASM, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2_E))
        y = x * root * root
    return y


@triton.jit
def silu_absmax(lowest, highest):
    """The largest |silu(x)| for x in [lowest, highest]: at an end, or in the dip if that lies between."""
    ends = tl.maximum(tl.abs(silu(lowest)), tl.abs(silu(highest)))
    around_dip = (lowest < SILU_DIP) & (highest > SILU_DIP)
    return tl.maximum(ends, tl.where(around_dip, SILU_DIP_DEPTH, 0.0))


@triton.jit
def gelu_erf(x):
    """x * Phi(x) with the exact normal distribution Phi, not the tanh form: relative error 3e-5, a sixteenth of fp16's rounding.

    gelu(x) = max(x, 0) - |x| * Phi(-|x|), and log2 Phi(-a) is so smooth that six terms give it on [0, 5.5]: no division,
    no branch, one exp2. The error stays relative in the negative tail, where 1 + erf would cancel.
    The terms are the minimax fit of log2(Phi(-a)) + 1 with no constant term, so that gelu(x) -> x / 2 at 0.
    """
    a = tl.minimum(tl.abs(x), GELU_REACH)
    tail = 2.65318004e-05
    tail = tail * a - 6.67778041e-04
    tail = tail * a + 7.53539701e-03
    tail = tail * a - 5.21274187e-02
    tail = tail * a - 4.60073917e-01
    tail = tail * a - 1.15076331
    phi = tl.exp2(tail * a - 1.0)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * phi
