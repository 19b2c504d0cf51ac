"""Triton kernel of group_norm_silu, after group_norm_statistics.py's. Formula: ../group_norm_silu.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..group_norm_silu import check_group_norm_silu
from ..repeat import empty, launch
from .activations import silu
from .group_norm_statistics import Bound, group_statistics
from .launch import cdiv, on_device
from .quantize_static import pixel_strides

BLOCK_P = 32
BLOCK_C = 64
NUM_WARPS = 2


@triton.jit
def _normalize_kernel(
    x_ptr, affine_ptr, y_ptr, P, C, stride_affine, stride_xb, stride_xp, stride_xc, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One tile of pixels and channels of one image; y is NHWC."""
    image = tl.program_id(2).to(tl.int64)
    pixels = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_c = channels < C
    inside = (pixels < P)[:, None] & inside_c[None, :]
    x_ptrs = x_ptr + image * stride_xb + pixels[:, None] * stride_xp + channels[None, :].to(tl.int64) * stride_xc
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    affine_ptrs = affine_ptr + image * C + channels
    factor = tl.load(affine_ptrs, mask=inside_c, other=0.0)[None, :]
    offset = tl.load(affine_ptrs + stride_affine, mask=inside_c, other=0.0)[None, :]
    y = silu(x * factor + offset)
    tl.store(y_ptr + (image * P + pixels)[:, None] * C + channels[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """See group_norm_silu_ref; within the rounding of fp32 sums and of x's dtype."""
    check_group_norm_silu(x, weight, bias)
    x = pixel_strides(x)[0]
    B, C, H, W = x.shape
    y = empty((B, H, W, C), x.dtype, x.device)
    with on_device(x):
        affine = group_statistics([x], weight.contiguous(), bias.contiguous(), eps, silu=True, bound=Bound.NONE).affine
        launch(
            _normalize_kernel, (cdiv(H * W, BLOCK_P), cdiv(C, BLOCK_C), B),
            x, affine, y, H * W, C, affine.stride(0), x.stride(0), pixel_strides(x)[1], x.stride(1),
            BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
        )  # fmt: skip
    return y.permute(0, 3, 1, 2)
