"""Nearest-2x upsampling and the 3x3 convolution after it as four 2x2 convolutions of the small image. Kernel in triton_ops.

Output pixel (2 h + p, 2 w + q) sees only 2x2 pixels of the small image, from (h + p - 1, w + q - 1) on: taps that fall on
the same pixel can be summed beforehand. 16 products per small pixel instead of 36, and the large image is never made.
Exact but for quantization: the summed taps are rounded, since sums of int8 codes would not fit int8. Only for a factor of 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import QuantizedActivation
from .finish import Finish, as_images, image_addend
from .int8_conv2d import BORDER_CLASSES, border_sums, check_geometry, inside_taps, int8_conv2d_ref
from .int8_gemm import check_segments, check_weight_codes
from .quantize_token import quantize_token_ref

PHASES = 4  # phase 2 p + q makes the pixels (2 h + p, 2 w + q)
# (phase of a side, tap of 2, tap of 3): taps 1 and 2 of the even phase fall on the same pixel, taps 0 and 1 of the odd one.
TAPS = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))


@dataclass(frozen=True)
class PhaseWeight:
    """The four 2x2 weights derived from a 3x3 one: a cache, never stored, invalid once the 3x3 weight changes.

    codes: (4, Cout, 2, 2, Cin) int8. scale: (4, Cout) fp32. border_sums: (4, 16, Cout) int32, as int8_conv2d's.
    """

    codes: Tensor
    scale: Tensor
    border_sums: Tensor

    @property
    def nbytes(self) -> int:
        """Memory held besides the 3x3 weight's."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.codes, self.scale, self.border_sums))


def summed_taps(weight: Tensor) -> Tensor:
    """(Cout, 3, 3, Cin) float -> (4, Cout, 2, 2, Cin), the float weights of the four phases."""
    if weight.ndim != 4 or tuple(weight.shape[1:3]) != (3, 3) or not weight.is_floating_point():
        raise LayoutError(
            f"summed_taps: weight is {weight.dtype} {tuple(weight.shape)}; a float (Cout, 3, 3, Cin) is needed. "
            "Dequantize it first; other kernel sizes keep the plain upsampling."
        )
    taps = torch.tensor(TAPS, dtype=weight.dtype, device=weight.device)
    phases = torch.einsum("pxi,qyj,oijc->pqoxyc", taps, taps, weight)
    return phases.reshape(PHASES, weight.shape[0], 2, 2, -1).contiguous()


def phase_weight(weight: Tensor) -> PhaseWeight:
    """Quantize the summed taps, symmetric int8 per phase and output channel.

    Args: weight: (Cout, 3, 3, Cin) any float dtype, the 16-bit or the dequantized weight; summed in fp32.
    Raises: LayoutError for other shapes.
    """
    summed = summed_taps(weight.float())
    _, Cout, _, _, Cin = summed.shape
    rows = quantize_token_ref(summed.view(PHASES * Cout, -1))
    codes = rows.codes.view(PHASES, Cout, 2, 2, Cin)
    taps = codes.sum(-1, dtype=torch.int32)  # (4, Cout, 2, 2)
    inside = inside_taps(2, codes.device)
    sums = torch.einsum("pnxy,rx,cy->prcn", taps.float(), inside.float(), inside.float()).round().to(torch.int32)
    return PhaseWeight(codes, rows.scale.view(PHASES, Cout), sums.reshape(PHASES, BORDER_CLASSES, Cout))


def check_upsample(activation: QuantizedActivation, weight: PhaseWeight, bias: Tensor | None) -> None:
    """Raise LayoutError unless the operands of int8_upsample_conv2d fit together."""
    if activation.codes.ndim != 4:
        raise LayoutError(f"int8_upsample_conv2d: codes of shape {tuple(activation.codes.shape)}; NHWC (B, H, W, C) is needed. Use images.")
    check_segments("int8_upsample_conv2d", activation, None, torch.int8)
    check_weight_codes("int8_upsample_conv2d", weight.codes[0], weight.scale[0], 4 * activation.codes.shape[3], bias)
    check_geometry("int8_upsample_conv2d", [activation], 3, 1, 1)


def int8_upsample_conv2d_ref(
    activation: QuantizedActivation,
    weight: PhaseWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    *,
    addend: Tensor | None = None,
) -> Tensor:
    """conv3x3(nearest2x(x)) with padding 1, on int8 codes of the small image x.

    Args:
        activation: codes (B, H, W, C), one scale per image or per whole number of images.
        weight: from phase_weight(). bias: (Cout,) any float dtype, or None.
        addend: (B, Cout), or (B, Cout, 2 H, 2 W) channels_last; see finish.py.
    Returns: (B, Cout, 2 H, 2 W) out_dtype with channels_last strides.
    Raises: LayoutError if the shapes do not fit.
    """
    check_upsample(activation, weight, bias)
    B, H, W, C = activation.codes.shape
    Cout = weight.scale.shape[1]
    finish = Finish(image_addend("int8_upsample_conv2d", addend, B, Cout, 2 * H, 2 * W))
    finish.check("int8_upsample_conv2d", B * 4 * H * W, Cout)
    y = torch.empty(B, 2 * H, 2 * W, Cout, dtype=torch.float32, device=activation.codes.device)
    for phase in range(PHASES):
        p, q = divmod(phase, 2)
        # The 2x2 kernel as part of a 3x3 one, whose first tap is at (h - 1, w - 1).
        kernel = torch.zeros(Cout, 3, 3, C, dtype=torch.int8, device=y.device)
        kernel[:, p : p + 2, q : q + 2] = weight.codes[phase]
        part = int8_conv2d_ref(activation, kernel, weight.scale[phase], border_sums(kernel), bias, out_dtype=torch.float32)
        y[:, p::2, q::2] = part.permute(0, 2, 3, 1)
    return as_images(finish.apply(y.view(-1, Cout), out_dtype), B, 2 * H, 2 * W)
