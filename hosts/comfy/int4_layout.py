"""4-bit weights as comfy_kitchen QuantizedTensors: Int8Layout's rules for a buffer of packed codes. Why one buffer: layouts.py."""

from __future__ import annotations

from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor, register_layout_class
from torch import Tensor

from ...kernels.dispatch import expanded_codes, paired_scales
from ...kernels.int4_weight import CHANNELS_PER_BLOCK, GROUP_SIZE
from ...quant.file_format import QuantizedLayer
from ...quant.int4 import quantize_int4
from ...quant.weight import dequantize_weight
from ..compute import sums_of_codes
from .layouts import INT4_LAYOUT, Int8Layout, WeightParts, joined, unpack


class Int4Layout(Int8Layout):
    """Linear weights of 4 bits. The buffer holds the codes, the channels' scales, the paired group scales, and sums if has_sums."""

    @classmethod
    def quantize(cls, tensor: Tensor, has_sums: bool = False, **kwargs: Any) -> tuple[Tensor, Int8Layout.Params]:
        """Of a patched weight: rounded to nearest, however the layer's own weight was rounded."""
        weight = quantize_int4(tensor, "a patched weight")
        params = cls.Params(tensor.dtype, tuple(tensor.shape), has_sums)
        return _pack(weight.packed(), weight.scale, paired_scales(weight.group_scale), has_sums), params

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Int8Layout.Params) -> Tensor:
        parts = cls.views(qdata, params)
        codes = expanded_codes(parts.qweight, parts.group_scale, params.orig_shape[1])
        return dequantize_weight(codes, parts.weight_scale, params.orig_dtype)

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        return {"has_sums": qtensor.params.has_sums}

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        parts = unpack(qtensor)
        return parts.qweight, parts.weight_scale, parts.group_scale

    @classmethod
    def views(cls, qdata: Tensor, params: Int8Layout.Params) -> WeightParts:
        N, K = params.orig_shape
        blocks = -(-K // CHANNELS_PER_BLOCK)
        codes = N * blocks * GROUP_SIZE  # a multiple of 64 bytes: no padding follows
        scale, group_scale, sums = _words(qdata, codes, [N, N * blocks, N if params.has_sums else 0])
        return WeightParts(
            qdata[:codes].view(torch.uint8).view(N, -1),
            scale.view(torch.float32),
            sums if params.has_sums else None,
            None,
            group_scale.view(blocks, N),
        )


register_layout_class(INT4_LAYOUT, Int4Layout)


def make_int4_weight(layer: QuantizedLayer, has_sums: bool, dtype: torch.dtype) -> QuantizedTensor:
    """The live weight of a stored layer with 4-bit weights. Arguments: as of layouts.make_weight."""
    packed = _pack(layer.qweight, layer.weight_scale, paired_scales(layer.group_scale), has_sums)
    return QuantizedTensor(packed, INT4_LAYOUT, Int4Layout.Params(dtype, layer.weight_shape, has_sums))


def _pack(qweight: Tensor, weight_scale: Tensor, group_scale: Tensor, has_sums: bool) -> Tensor:
    parts = [qweight, weight_scale.float(), group_scale]
    return joined([*parts, sums_of_codes(qweight, group_scale=group_scale)] if has_sums else parts)


def _words(buffer: Tensor, start: int, counts: list[int]) -> list[Tensor]:
    """Runs of so many int32 values one after the other, each padded to the buffer's alignment."""
    found = []
    for count in counts:
        found.append(buffer[start : start + 4 * count].view(torch.int32))
        start += Int8Layout.aligned(4 * count)
    return found
