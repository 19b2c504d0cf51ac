"""The UNet's first and last layers, which stay 16 bit: images are channels_last from the first one on, and normalised in one pass."""

from __future__ import annotations

import comfy.ops
import torch
from torch import Tensor, nn

from ....kernels import dispatch
from ....kernels.group_norm_silu_quantize import GROUPS
from ..guard import Guard, Unowned
from ..norms import borrow_norm


class ChannelsLastConv:
    """Bound to the UNet's first convolution. Otherwise the last skip-concat joins two layouts, which copies both."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self._conv = Unowned(conv)

    def forward(self, x: Tensor) -> Tensor:
        conv = self._conv()
        return type(conv).forward(conv, x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x)


class FusedExit:
    """Bound to the UNet's last GroupNorm, SiLU and convolution. PyTorch's GroupNorm would copy the image to NCHW."""

    def __init__(self, layers: nn.Sequential) -> None:
        self._layers = Unowned(layers)
        self._norm, self._conv = layers[0], layers[2]
        self._guard = Guard(layers, (nn.Sequential,))

    @staticmethod
    def fits(layers: nn.Module) -> bool:
        """Whether this is SDXL's: 32 groups, SiLU, a 2D convolution."""
        return (
            type(layers) is nn.Sequential
            and len(layers) == 3
            and isinstance(layers[0], nn.GroupNorm)
            and layers[0].num_groups == GROUPS
            and type(layers[1]) is nn.SiLU
            and isinstance(layers[2], nn.Conv2d)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = None
        if not (torch.compiler.is_compiling() or x.ndim != 4 or self._guard.is_foreign()):
            comfy.ops.run_every_op()
            with borrow_norm(self._norm, x) as norm:
                y = None if norm is None else dispatch.group_norm_silu(x, norm.weight, norm.bias, norm.eps)
        if y is None:
            return nn.Sequential.forward(self._layers(), x)
        return self._conv(y).contiguous()  # samplers and other nodes are given NCHW
