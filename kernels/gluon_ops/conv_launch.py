"""Launches the Gluon convolution for what it serves: one segment of channels, stride 1, 16-bit results. Formula: ../int8_conv2d.py."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..activation import QuantizedActivation
from ..design import BOXES, Design
from ..repeat import empty, launch
from ..triton_ops.launch import cdiv, on_device
from .conv_kernel import _gluon_conv_kernel
from .launch import ELEMENT, constants, fits_early

# Of a tile's first BLOCK_N columns, finished and stored one after the other; as in the kernel.
PARTS = 4


def convolve(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    border_sums: Tensor | None,
    bias: Tensor | None,
    addend: Tensor | None,
    padding: int,
    sides: tuple[int, int],
    out_dtype: torch.dtype,
    design: Design,
) -> Tensor:
    """(B * Ho * Wo, N) out_dtype, with stride 1.

    Args: qweight: (N, k, k, C), contiguous. addend: (B, N), or (B * Ho * Wo, N) in out_dtype. sides: Ho, Wo.
    """
    codes, (N, kernel, _, C) = activation.codes, qweight.shape
    (B, H, W, _), (Ho, Wo) = codes.shape, sides
    y = empty((B * Ho * Wo, N), out_dtype, codes.device)
    per_image = addend is not None and addend.shape[0] == B
    has_residual = addend is not None and not per_image
    image = y.view(B, Ho, Wo, N)
    residual = addend.view(B, Ho, Wo, N) if has_residual else image
    box, block_k = BOXES[design.BLOCK_M], design.BLOCK_K
    part_n, boxes = design.BLOCK_N // PARTS, (cdiv(Ho, box[0]), cdiv(Wo, box[1]))
    tiles_m = B * boxes[0] * boxes[1]
    has_zero_point = activation.zero_point is not None
    rows = qweight.view(N, -1)
    with on_device(y):
        launch(
            _gluon_conv_kernel, (tiles_m * cdiv(N, design.columns),),
            _describe(codes, [1, *box, block_k]), _describe(rows, [design.BLOCK_N, block_k]), _describe(rows, [design.rest_n, block_k]),
            _describe(image, [1, *box, part_n]), _describe(image, [1, *box, design.rest_n]),
            _describe(residual, [1, *box, part_n]), _describe(residual, [1, *box, design.rest_n]), int(has_residual),
            activation.scale, activation.zero_point, weight_scale, border_sums if has_zero_point else None,
            y if bias is None else bias, int(bias is not None), addend if per_image else y, int(per_image),
            N, C, H, W, *boxes, tiles_m, activation.rows_per_scale // (H * W),
            KERNEL=kernel, PADDING=padding, BOX_H=box[0], BOX_W=box[1], REST_N=design.rest_n,
            EARLY=fits_early(design), **constants(design, codes.dtype),
        )  # fmt: skip
    return y


def _describe(tensor: Tensor | None, block: list[int]) -> TensorDescriptor | None:
    """A tensor descriptor whose copies are of shape `block`; None if there are none."""
    if tensor is None or not block[0] or not block[-1]:
        return None
    layout = gl.NVMMASharedLayout.get_default_for(block, ELEMENT[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)
