"""Launcher of int8_conv2d, and what fp8_conv2d and the upsampler share with it. Formula: ../int8_conv2d.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..activation import QuantizedActivation
from ..design import BOXES, MAX_BOX_WASTE, TRITON, Design, box_waste, default_conv_design
from ..finish import Finish, as_images, image_addend
from ..int8_conv2d import check_conv, output_side
from ..repeat import empty, launch
from ..tables import Product, tuned_design
from .conv_kernel import _conv2d_kernel
from .int8_gemm import (
    DTYPE_NAME,
    design_constants,
    divides_k,
    fitting,
    optional_bias,
    program_grid,
    segment_scales,
    serves_gluon,
    split_workspace,
)
from .launch import cdiv, compute_capability, describe, gluon, on_device

UPSAMPLE_PHASES = 4


def int8_conv2d(
    activation: QuantizedActivation,
    qweight: Tensor,
    weight_scale: Tensor,
    border_sums: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    out_dtype: torch.dtype = torch.float16,
    *,
    second: QuantizedActivation | None = None,
    addend: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor | QuantizedActivation:
    """See int8_conv2d_ref; the integer sums are the same, the scaling may round differently."""
    check_conv(activation, qweight, weight_scale, border_sums, bias, stride, padding, second)
    geometry = Geometry.of(activation.codes, qweight.shape[1], stride, padding)
    finish = geometry.finish("int8_conv2d", qweight.shape[0], addend, out_scale, out_zero_point)
    return launch_conv(activation, second, qweight, weight_scale, border_sums, bias, out_dtype, geometry, finish)


@dataclass(frozen=True)
class Geometry:
    """B images of (H, W) pixels under a kernel; (Ho, Wo) output pixels of each image and phase."""

    B: int
    H: int
    W: int
    kernel: int
    stride: int
    padding: int
    Ho: int
    Wo: int
    phases: int = 1

    @classmethod
    def of(cls, codes: Tensor, kernel: int, stride: int, padding: int) -> Geometry:
        B, H, W, _ = codes.shape
        return cls(B, H, W, kernel, stride, padding, output_side(H, kernel, stride, padding), output_side(W, kernel, stride, padding))

    @classmethod
    def upsampling(cls, codes: Tensor) -> Geometry:
        B, H, W, _ = codes.shape
        return cls(B, H, W, 2, 1, 1, H, W, UPSAMPLE_PHASES)

    @property
    def operation(self) -> str:
        """Its name in the tables."""
        if self.phases > 1:
            return "upsample2x"
        return f"conv{self.kernel}x{self.kernel}" + ("" if self.stride == 1 else f"_stride{self.stride}")

    @property
    def output_sides(self) -> tuple[int, int]:
        return (2 * self.Ho, 2 * self.Wo) if self.phases > 1 else (self.Ho, self.Wo)

    def finish(self, operation: str, Cout: int, addend: Tensor | None, out_scale: Tensor | None, out_zero_point: Tensor | None) -> Finish:
        """The checked Finish of this convolution's output."""
        Ho, Wo = self.output_sides
        finish = Finish(image_addend(operation, addend, self.B, Cout, Ho, Wo), out_scale, out_zero_point)
        finish.check(operation, self.B * Ho * Wo, Cout)
        return finish


def conv_design(codes: Tensor, second: Tensor | None, N: int, geometry: Geometry, sm: int) -> Design:
    """The table's design for this product, or the default; descriptors only where boxes fit the image."""
    M, C = geometry.B * geometry.Ho * geometry.Wo, codes.shape[3]
    segments, C_all = (1, C) if second is None else (2, C + second.shape[3])
    tuned = tuned_design(sm, Product(geometry.operation, DTYPE_NAME[codes.dtype], segments, M, N, C_all))
    design = default_conv_design(sm, M, N, C) if tuned is None else tuned
    takes_boxes = geometry.stride == 1 and box_waste(design, geometry.Ho, geometry.Wo) <= MAX_BOX_WASTE
    return design if takes_boxes else replace(design, backend=TRITON, tma=False, rest_n=0)


def _takes_gluon(
    design: Design, activation: QuantizedActivation, weight: Tensor, out_dtype: torch.dtype, geometry: Geometry, finish: Finish, sm: int
) -> bool:
    """Whether Gluon's kernel serves this: no upsampler, an addend per image or per pixel."""
    N = weight.shape[0]
    added = finish.addend is None or finish.addend.shape[0] in (geometry.B, geometry.B * geometry.Ho * geometry.Wo)
    row_bytes = N * out_dtype.itemsize
    return geometry.phases == 1 and added and serves_gluon(design, activation, [weight], (out_dtype, finish.addend), row_bytes, sm)


def launch_conv(
    activation: QuantizedActivation,
    second: QuantizedActivation | None,
    qweight: Tensor,
    weight_scale: Tensor,
    border_sums: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    geometry: Geometry,
    finish: Finish,
) -> Tensor | QuantizedActivation:
    """One launch on operands that have been checked, of Gluon's kernel or Triton's. qweight: ([phases,] N, k, k, C), contiguous."""
    codes, qweight, N = activation.codes, qweight.contiguous(), weight_scale.shape[-1]
    sm = compute_capability(codes.device)
    design = conv_design(codes, None if second is None else second.codes, N, geometry, sm)
    if second is None and finish.out_scale is None and _takes_gluon(design, activation, qweight, out_dtype, geometry, finish, sm):
        sides, options = geometry.output_sides, (geometry.padding, geometry.output_sides, out_dtype, design)
        y = gluon("conv_launch").convolve(activation, qweight, weight_scale, border_sums, bias, finish.addend, *options)
        return as_images(y, geometry.B, *sides)
    return _launch_triton(activation, second, qweight, weight_scale, border_sums, bias, out_dtype, geometry, finish, design)


def _launch_triton(
    activation: QuantizedActivation,
    second: QuantizedActivation | None,
    qweight: Tensor,
    weight_scale: Tensor,
    border_sums: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    geometry: Geometry,
    finish: Finish,
    design: Design,
) -> Tensor | QuantizedActivation:
    codes, codes_2 = activation.codes.contiguous(), None if second is None else second.codes.contiguous()
    N, dtype, H, W = weight_scale.shape[-1], codes.dtype, geometry.H, geometry.W
    flat_weight = qweight.view(geometry.phases * N, -1)
    C, C_2 = codes.shape[3], 0 if second is None else codes_2.shape[3]
    sm = compute_capability(codes.device)
    design = fitting(design, (codes, codes_2, flat_weight), sm)
    if design.rest_n and (not design.tma or second is not None or design.split_k > 1):
        design = replace(design, rest_n=0)
    Ho, Wo = geometry.output_sides
    M = geometry.B * geometry.Ho * geometry.Wo
    y = empty((geometry.B * Ho * Wo, N), torch.int8 if finish.out_scale is not None else out_dtype, codes.device)
    box = BOXES.get(design.BLOCK_M, (1, 1)) if design.tma else (1, 1)
    boxes = (cdiv(geometry.Ho, box[0]), cdiv(geometry.Wo, box[1]))
    tiles_m = geometry.B * boxes[0] * boxes[1] if design.tma else cdiv(M, design.BLOCK_M)
    tiles = geometry.phases * tiles_m * cdiv(N, design.columns)
    partial, counter = split_workspace(design, tiles, codes)
    rest_weight = None
    if design.tma:
        a_block = [1, *box, design.BLOCK_K]
        codes, codes_2 = describe(codes, a_block), None if second is None else describe(codes_2, a_block)
        rest_weight = describe(flat_weight, [design.rest_n, design.BLOCK_K]) if design.rest_n else None
        flat_weight = describe(flat_weight, [design.BLOCK_N, design.BLOCK_K])
    constants = design_constants(design, dtype, sm, 1 if second is None else 2)
    if constants["PARTS"] == 2 and (design.rest_n or activation.zero_point is not None):
        constants["PARTS"] = 4  # a border class's sums are as many values as a part has columns; and rest_n is a quarter of BLOCK_N
    with on_device(y):
        launch(
            _conv2d_kernel, program_grid(design, tiles, y.device),
            codes, codes_2, flat_weight, rest_weight, y,
            *segment_scales(activation, second), weight_scale, border_sums,
            *optional_bias(bias, y), finish.addend, finish.out_scale, finish.out_zero_point, partial, counter,
            M, N, C, C_2, H, W, geometry.Ho, geometry.Wo, *boxes,
            activation.rows_per_scale // (H * W), 1 if second is None else second.rows_per_scale // (H * W),
            finish.rows_per(finish.addend, y.shape[0]), finish.rows_per(finish.out_scale, y.shape[0]),
            KERNEL=geometry.kernel, STRIDE=geometry.stride, PADDING=geometry.padding, PHASES=geometry.phases, BOX_H=box[0], BOX_W=box[1],
            EVEN_C=divides_k(design, C, C_2), REST_N=design.rest_n, **constants,
        )  # fmt: skip
    return as_images(y if finish.out_scale is None else finish.activation(y, y.shape[0]), geometry.B, Ho, Wo)
