"""int8 and fp8 weights as comfy_kitchen QuantizedTensors, which ComfyUI's memory management, LoRA and merge code understands.

Codes, scales, code sums and channel groups of a layer lie in one buffer, not in tensors beside each other. comfy_kitchen copies a
QuantizedTensor's codes and its parameters by different routes: detach() copies the parameters, so that ComfyUI's
restore into a live weight (utils.copy_to_param) would bring back the codes and not their scale, and a copied parameter
object may still share its tensors with the live weight. With one buffer there is nothing to get out of step, a weight
faults into VRAM in one transfer, and its size is the size of the buffer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class
from torch import Tensor

from ...errors import LayoutError
from ...kernels.channel_group import Borders
from ...kernels.dispatch import ChannelGroups
from ...kernels.int8_conv2d import BORDER_CLASSES
from ...quant.channel_group import ChannelGrouping, regrouped_weight
from ...quant.weight import FP8, dequantize_weight, quantize_weight
from ..compute import sums_of_codes
from ..low_rank import LowRankBranch

LAYOUT, INT4_LAYOUT, FP8_LAYOUT = LAYOUTS = ("StepQuantInt8", "StepQuantInt4", "StepQuantFp8")
# Kernels load 16 bytes at a time; the parts of the buffer start at multiples of it.
ALIGNMENT = 16


class GroupTable(NamedTuple):
    """What the host knows of a layer's channel groups; see kernels/channel_group.ChannelGroups."""

    borders: Borders
    granularity: int


@dataclass(frozen=True)
class WeightParts:
    """Views into one buffer. qweight: int8 or e4m3 (N, K) or (Cout, kh, kw, Cin). weight_scale: fp32 (N,). weight_sums: see compute.py.

    groups: of a layer with channel groups, whose qweight holds the input channels in their order; None elsewhere.
    group_scale: of 4-bit weights, whose qweight is packed (kernels/int4_weight.py); None elsewhere. branch: beside such codes, or None.
    """

    qweight: Tensor
    weight_scale: Tensor
    weight_sums: Tensor | None
    groups: ChannelGroups | None
    group_scale: Tensor | None = None
    branch: LowRankBranch | None = None


class Int8Layout(QuantizedLayout):
    """Linear and Conv2d weights, int8 with one scale per output channel.

    dequantize() returns ComfyUI's order: OIHW for a conv, and the model's order of input channels.
    """

    CODES = torch.int8

    @dataclass(frozen=True)
    class Params:
        """Holds no tensors: see the top of this file. has_sums: the buffer has the sums that a zero point needs. groups: with
        their order and factors in the buffer. rank: of the branch in it, beside 4-bit codes."""

        orig_dtype: torch.dtype
        orig_shape: tuple[int, ...]
        has_sums: bool
        groups: GroupTable | None = None
        rank: int = 0

        def to_device(self, device: torch.device) -> Int8Layout.Params:
            return self

        def clone(self) -> Int8Layout.Params:
            return self

        def copy_from(self, src: Int8Layout.Params, non_blocking: bool = False) -> None:
            """Nothing to copy: the buffer carries everything, and all weights that a layer ever has are in the same groups."""
            if src.groups != self.groups or src.rank != self.rank:
                raise LayoutError("a weight is copied into a layer with other channel groups or branch. Load or quantize the model again.")

    @classmethod
    def quantize(cls, tensor: Tensor, has_sums: bool = False, groups: ChannelGroups | None = None, **kwargs: Any) -> tuple[Tensor, Params]:
        """Scales are always taken from the tensor, which is what ComfyUI's scale="recalculate" asks for; groups are kept.

        Stochastic rounding is ignored: codes rounded to nearest are as near, and two loads give the same picture.
        """
        if groups is None:
            weight = quantize_weight(tensor, "a patched weight", cls.CODES)
        else:
            groups = groups.to(tensor.device)
            grouping = ChannelGrouping(groups.order, groups.exponents.to(tensor.device), groups.granularity)
            weight = regrouped_weight(tensor, grouping, symmetric=not has_sums, layer="a patched weight")
        params = cls.Params(tensor.dtype, tuple(tensor.shape), has_sums, _table_of(groups))
        return pack(weight.codes, weight.scale, has_sums, groups), params

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        parts = cls.views(qdata, params)
        order = None if parts.groups is None else parts.groups.order
        return dequantize_weight(parts.qweight, parts.weight_scale, params.orig_dtype, order)

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        return {"has_sums": qtensor.params.has_sums, "groups": unpack(qtensor).groups}

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        parts = unpack(qtensor)
        return parts.qweight, parts.weight_scale

    @classmethod
    def views(cls, qdata: Tensor, params: Params) -> WeightParts:
        """The parts of a buffer; no copies."""
        return _views(qdata, params, cls.CODES)

    @staticmethod
    def aligned(size: int) -> int:
        """Bytes that a part of this size takes in a buffer."""
        return -(-size // ALIGNMENT) * ALIGNMENT

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Params) -> dict[str, Tensor]:
        """Nothing: a stock checkpoint has no place for these codes. save.py fills in float weights when ComfyUI saves."""
        return {}


class Fp8Layout(Int8Layout):
    """The same with e4m3 codes. Without sums and groups: floating-point codes need neither."""

    CODES = FP8


register_layout_class(LAYOUT, Int8Layout)
register_layout_class(FP8_LAYOUT, Fp8Layout)


def make_weight(
    qweight: Tensor, weight_scale: Tensor, has_sums: bool, dtype: torch.dtype, groups: ChannelGroups | None = None
) -> QuantizedTensor:
    """The live weight of a layer.

    Args:
        qweight: int8 or e4m3 (N, K) or (Cout, kh, kw, Cin), its input channels in the order of `groups`. weight_scale: fp32 (N,).
        has_sums: the layer's activations have a zero point.
        dtype: what the weight is for the rest of ComfyUI, and what it dequantizes to.
    """
    shape = tuple(qweight.shape)
    if len(shape) == 4:
        shape = (shape[0], shape[3], shape[1], shape[2])
    params = Int8Layout.Params(dtype, shape, has_sums, _table_of(groups))
    layout = FP8_LAYOUT if qweight.dtype is FP8 else LAYOUT
    return QuantizedTensor(pack(qweight, weight_scale, has_sums, groups), layout, params)


def is_quantized(weight: Tensor | None) -> bool:
    """Whether a module's weight is one of ours."""
    return isinstance(weight, QuantizedTensor) and weight._layout_cls in LAYOUTS


def unpack(weight: QuantizedTensor) -> WeightParts:
    """The parts of a live weight; the views are kept with their buffer, since every forward asks for them."""
    if torch.compiler.is_compiling():
        return weight.layout_cls.views(weight._qdata, weight._params)
    buffer, parts = getattr(weight, "_stepquant_parts", (None, None))
    if buffer is not weight._qdata:
        parts = weight.layout_cls.views(weight._qdata, weight._params)
        weight._stepquant_parts = (weight._qdata, parts)
    return parts


def pack(qweight: Tensor, weight_scale: Tensor, has_sums: bool, groups: ChannelGroups | None = None) -> Tensor:
    """One int8 buffer: codes, scales, sums, the groups' tables."""
    parts = [qweight, weight_scale.float()]
    if has_sums:
        parts.append(sums_of_codes(qweight, groups))
    if groups is not None:
        parts += [groups.order, groups.position_factor, groups.channel_factor, groups.ends, groups.shifts]
    return joined(parts)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One int8 buffer of tensors, each padded to 16 bytes."""
    sizes = [Int8Layout.aligned(part.numel() * part.element_size()) for part in parts]
    buffer = torch.zeros(sum(sizes), dtype=torch.int8, device=parts[0].device)
    offset = 0
    for part, size in zip(parts, sizes, strict=True):
        raw = part.contiguous().view(-1).view(torch.int8)
        buffer[offset : offset + raw.numel()] = raw
        offset += size
    return buffer


def _table_of(groups: ChannelGroups | None) -> GroupTable | None:
    return None if groups is None else GroupTable(groups.borders, groups.granularity)


def _views(buffer: Tensor, params: Int8Layout.Params, codes_dtype: torch.dtype) -> WeightParts:
    shape, channels = params.orig_shape, params.orig_shape[0]
    inputs = shape[1]
    if len(shape) == 4:
        shape = (channels, shape[2], shape[3], inputs)
    codes = math.prod(shape)
    start = Int8Layout.aligned(codes)

    def take(dtype: torch.dtype, count: int) -> Tensor:
        """The next values of 4 bytes."""
        nonlocal start
        view = buffer[start : start + 4 * count].view(dtype)
        start += Int8Layout.aligned(4 * count)
        return view

    scale = take(torch.float32, channels)
    sums = groups = None
    if params.has_sums:
        rows = 1 if len(shape) == 2 or shape[1:3] == (1, 1) else BORDER_CLASSES
        sums = take(torch.int32, channels * rows)
        sums = sums.view(rows, channels) if rows > 1 else sums
    if params.groups is not None:
        order, factors = take(torch.int32, inputs), [take(torch.float32, inputs) for _ in range(2)]
        tables = [take(torch.int32, len(params.groups.borders)) for _ in range(2)]
        groups = ChannelGroups(order, *factors, *tables, *params.groups)
    return WeightParts(buffer[:codes].view(codes_dtype).view(shape), scale, sums, groups)
