"""A float UNet that behaves as if its layers ran on codes of any width: for widths that no kernel has. Slow and memory-hungry."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepquant.hosts.diffusers.timestep_tap import TimestepTap
from stepquant.hosts.key_mapping import ldm_to_diffusers
from stepquant.quant.calibration import ActivationTables, quantized_values, static_range
from stepquant.quant.weight import SMALLEST_SCALE, dequantize_weight, quantize_weight


class SimulatedUNet:
    """Weights rounded to 8 bits once; inputs rounded at every call. Set `tables` and `bits` to change what the next call does.

    tables: static scales by layer; a layer without them has one dynamic scale per row, per image if it is a 3x3 convolution.
    """

    def __init__(self, unet: nn.Module, layers: list[str]) -> None:
        self.tables: Mapping[str, ActivationTables] = {}
        self.bits = 8
        self.unet = copy.deepcopy(unet)
        self._tap = TimestepTap(self.unet)
        for name in layers:
            module = self.unet.get_submodule(ldm_to_diffusers(name))
            codes = quantize_weight(module.weight, name)
            module.weight.data = dequantize_weight(codes.codes, codes.scale, module.weight.dtype)
            module.register_forward_pre_hook(self._rounding(name))

    def _rounding(self, name: str):
        def before_layer(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, tables = args[0], self.tables.get(name)
            if tables is None:
                return (self._dynamic(x, isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)),)
            shape = (-1, *[1] * (x.ndim - 1))
            zero_point = 0 if tables.zero_point is None else tables.zero_point[self._tap.bucket].view(shape)
            return (quantized_values(x, tables.scale[self._tap.bucket].view(shape), zero_point, tables.zero_point is None, self.bits),)

        return before_layer

    def _dynamic(self, x: Tensor, per_image: bool) -> Tensor:
        channels = 1 if x.ndim == 4 else -1
        size = x.abs().amax((1, 2, 3), keepdim=True) if per_image else x.abs().amax(channels, keepdim=True)
        scale = size.clamp_min(SMALLEST_SCALE) / (2 ** (self.bits - 1) - 1)
        return quantized_values(x, scale, 0, True, self.bits)


def plain_min_max(low: float, high: float, symmetric: bool, bits: int) -> ActivationTables:
    """One scale for the whole range at every timestep, nothing clipped: the plain alternative."""
    scale, zero_point = static_range(low, high, symmetric, bits)
    return ActivationTables(torch.full((64,), scale), None if symmetric else torch.full((64,), zero_point, dtype=torch.int32))
