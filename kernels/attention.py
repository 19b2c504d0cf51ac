"""Attention in 16-bit floats whose result can be codes. Formula, checks and reference; for which shapes a kernel is used: triton_ops."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ..errors import LayoutError
from .activation import QuantizedActivation
from .quantize_static import quantize_static_ref
from .static_scale import StaticScale

OPERATION = "attention"


def check_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, static: StaticScale | None) -> None:
    """Raise LayoutError unless q is (B, T, h d) and k and v are (B, S, h d), of one float dtype, and the static samples divide B."""
    shapes = [tuple(x.shape) for x in (q, k, v)]
    fit = q.ndim == k.ndim == 3 and k.shape == v.shape and q.shape[::2] == k.shape[::2] and q.shape[2] % heads == 0
    if not fit or not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise LayoutError(
            f"{OPERATION}: q, k and v of shapes {shapes} and {q.dtype}, {k.dtype}, {v.dtype}, {heads} heads; (B, T, h * d) and twice "
            "(B, S, h * d) of one float dtype are needed. Pass the projections' outputs."
        )
    if static is not None:
        static.rows_per_scale(OPERATION, q.shape[0] * q.shape[1], q.shape[0])


def attention_ref(q: Tensor, k: Tensor, v: Tensor, heads: int, static: StaticScale | None = None) -> Tensor | QuantizedActivation:
    """softmax(q k^T / sqrt(d)) v of every head, in fp32; then quantize_static_ref of it if `static` is given.

    Unlike attention and quantization one after the other, the result is not rounded to 16 bit before it is quantized.
    Args:
        q: (B, T, h * d). k, v: (B, S, h * d), one float dtype, any strides; left unchanged. heads: h.
        static: of the Linear that reads the result; its samples divide B.
    Returns: (B, T, h * d) in q's dtype, or codes (B * T, h * d).
    Raises: LayoutError if the shapes do not fit.
    """
    check_attention(q, k, v, heads, static)
    q32, k32, v32 = (x.float().unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    y = functional.scaled_dot_product_attention(q32, k32, v32).transpose(1, 2).flatten(2)
    if static is None:
        return y.to(q.dtype)
    return quantize_static_ref(y.flatten(0, 1), static.scale, static.zero_point, static.bucket, static.clipped)
