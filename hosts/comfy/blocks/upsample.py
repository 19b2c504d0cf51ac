"""Upsample on codes, at exactly twice the size. Another size, as odd latents need, is ComfyUI's.

Not the four 2x2 phase convolutions of kernels/int8_upsample_conv2d.py: these round summed weights a second time.
"""

from __future__ import annotations

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Upsample
from torch import Tensor, nn

from ..guard import Guard, Unowned, is_stock
from .call_scope import CallScope
from .layers import UpsampledConv


class FusedUpsample:
    """Bound to Upsample."""

    def __init__(self, block: Upsample, scope: CallScope) -> None:
        self._block, self._scope = Unowned(block), scope
        self._conv = UpsampledConv(block.conv)
        self._guard = Guard(block, (Upsample,))

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether this is SDXL's: 2D, with a 3x3 convolution."""
        return (
            type(block) is Upsample
            and is_stock(Upsample)
            and block.dims == 2
            and block.use_conv
            and isinstance(block.conv, nn.Conv2d)
            and block.conv.kernel_size == (3, 3)
        )

    def forward(self, x: Tensor, output_shape: torch.Size | None = None) -> Tensor:
        block, y = self._block(), None
        if not (torch.compiler.is_compiling() or x.ndim != 4 or self._is_another_size(x, output_shape) or self._guard.is_foreign()):
            comfy.ops.run_every_op()
            y = self._conv(x, self._scope.bucket(x.device))
        return type(block).forward(block, x, output_shape) if y is None else y

    @staticmethod
    def _is_another_size(x: Tensor, output_shape: torch.Size | None) -> bool:
        return output_shape is not None and (output_shape[2], output_shape[3]) != (2 * x.shape[2], 2 * x.shape[3])
