"""int8 weights as comfy_kitchen QuantizedTensors, which ComfyUI's memory management, LoRA and merge code understands.

Codes, scales and code sums of a layer lie in one buffer, not in tensors beside each other. comfy_kitchen copies a
QuantizedTensor's codes and its parameters by different routes: detach() copies the parameters, so that ComfyUI's
restore into a live weight (utils.copy_to_param) would bring back the codes and not their scale, and a copied parameter
object may still share its tensors with the live weight. With one buffer there is nothing to get out of step, a weight
faults into VRAM in one transfer, and its size is the size of the buffer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class
from torch import Tensor

from ...kernels.int8_conv2d import BORDER_CLASSES
from ...quant.weight import dequantize_weight, quantize_weight
from ..compute import sums_of_codes

LAYOUT = "StepQuantInt8"
# Kernels load 16 bytes at a time; the parts of the buffer start at multiples of it.
ALIGNMENT = 16


@dataclass(frozen=True)
class WeightParts:
    """Views into one buffer. qweight: int8 (N, K) or (Cout, kh, kw, Cin). weight_scale: fp32 (N,). weight_sums: compute.sums_of_codes."""

    qweight: Tensor
    weight_scale: Tensor
    weight_sums: Tensor | None


class Int8Layout(QuantizedLayout):
    """Linear and Conv2d weights, int8 with one scale per output channel. dequantize() returns ComfyUI's order, OIHW for a conv."""

    @dataclass(frozen=True)
    class Params:
        """Holds no tensors: see the top of this file. has_sums: the buffer ends with the sums that a zero point needs."""

        orig_dtype: torch.dtype
        orig_shape: tuple[int, ...]
        has_sums: bool

        def to_device(self, device: torch.device) -> Int8Layout.Params:
            return self

        def clone(self) -> Int8Layout.Params:
            return self

        def copy_from(self, src: Int8Layout.Params, non_blocking: bool = False) -> None:
            """Nothing to copy: the buffer carries everything, and buffers of another kind differ in size."""

    @classmethod
    def quantize(cls, tensor: Tensor, has_sums: bool = False, **kwargs: Any) -> tuple[Tensor, Params]:
        """Scales are always taken from the tensor, which is what ComfyUI's scale="recalculate" asks for.

        Stochastic rounding is ignored: codes rounded to nearest are as near, and two loads give the same picture.
        """
        weight = quantize_weight(tensor, "a patched weight")
        return pack(weight.codes, weight.scale, has_sums), cls.Params(tensor.dtype, tuple(tensor.shape), has_sums)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        parts = _views(qdata, params)
        return dequantize_weight(parts.qweight, parts.weight_scale, params.orig_dtype)

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        return {"has_sums": qtensor.params.has_sums}

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        parts = unpack(qtensor)
        return parts.qweight, parts.weight_scale

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Params) -> dict[str, Tensor]:
        """Nothing: a stock checkpoint has no place for these codes. save.py fills in float weights when ComfyUI saves."""
        return {}


register_layout_class(LAYOUT, Int8Layout)


def make_weight(qweight: Tensor, weight_scale: Tensor, has_sums: bool, dtype: torch.dtype) -> QuantizedTensor:
    """The live weight of a layer.

    Args:
        qweight: int8 (N, K) or (Cout, kh, kw, Cin). weight_scale: fp32 (N,).
        has_sums: the layer's activations have a zero point.
        dtype: what the weight is for the rest of ComfyUI, and what it dequantizes to.
    """
    shape = tuple(qweight.shape)
    if len(shape) == 4:
        shape = (shape[0], shape[3], shape[1], shape[2])
    return QuantizedTensor(pack(qweight, weight_scale, has_sums), LAYOUT, Int8Layout.Params(dtype, shape, has_sums))


def is_quantized(weight: Tensor | None) -> bool:
    """Whether a module's weight is one of ours."""
    return isinstance(weight, QuantizedTensor) and weight._layout_cls == LAYOUT


def unpack(weight: QuantizedTensor) -> WeightParts:
    """The parts of a live weight; the views are kept with their buffer, since every forward asks for them."""
    if torch.compiler.is_compiling():
        return _views(weight._qdata, weight._params)
    buffer, parts = getattr(weight, "_stepquant_parts", (None, None))
    if buffer is not weight._qdata:
        parts = _views(weight._qdata, weight._params)
        weight._stepquant_parts = (weight._qdata, parts)
    return parts


def pack(qweight: Tensor, weight_scale: Tensor, has_sums: bool) -> Tensor:
    """One int8 buffer: codes, scales, sums, each padded to 16 bytes."""
    parts = [qweight, weight_scale.float()]
    if has_sums:
        parts.append(sums_of_codes(qweight))
    sizes = [_aligned(part.numel() * part.element_size()) for part in parts]
    buffer = torch.zeros(sum(sizes), dtype=torch.int8, device=qweight.device)
    offset = 0
    for part, size in zip(parts, sizes, strict=True):
        raw = part.contiguous().view(-1).view(torch.int8)
        buffer[offset : offset + raw.numel()] = raw
        offset += size
    return buffer


def _views(buffer: Tensor, params: Int8Layout.Params) -> WeightParts:
    shape, channels = params.orig_shape, params.orig_shape[0]
    if len(shape) == 4:
        shape = (channels, shape[2], shape[3], shape[1])
    codes = math.prod(shape)
    scale_start = _aligned(codes)
    scale = buffer[scale_start : scale_start + 4 * channels].view(torch.float32)
    sums = None
    if params.has_sums:
        rows = 1 if len(shape) == 2 or shape[1:3] == (1, 1) else BORDER_CLASSES
        start = scale_start + _aligned(4 * channels)
        sums = buffer[start : start + 4 * channels * rows].view(torch.int32)
        sums = sums.view(rows, channels) if rows > 1 else sums
    return WeightParts(buffer[:codes].view(shape), scale, sums)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
