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
from ..low_rank import LowRankBranch
from .layouts import INT4_LAYOUT, Int8Layout, WeightParts, joined, unpack


class Int4Layout(Int8Layout):
    """Linear weights of 4 bits. The buffer holds the codes, the channels' scales, the paired group scales, sums if has_sums, and the
    factors of the branch beside the codes, if there is one: the weight is what both amount to, for patches, merges and savers."""

    @classmethod
    def quantize(
        cls, tensor: Tensor, has_sums: bool = False, branch: LowRankBranch | None = None, **kwargs: Any
    ) -> tuple[Tensor, Int8Layout.Params]:
        """Of a patched weight: what its branch leaves over is rounded to nearest, however the layer's own weight was rounded."""
        left = tensor if branch is None else tensor.float() - _dense(branch).to(tensor.device)
        weight = quantize_int4(left, "a patched weight")
        params = cls.Params(tensor.dtype, tuple(tensor.shape), has_sums, rank=0 if branch is None else branch.down.shape[0])
        return _pack(weight.packed(), weight.scale, paired_scales(weight.group_scale), has_sums, branch), params

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Int8Layout.Params) -> Tensor:
        parts = cls.views(qdata, params)
        codes = expanded_codes(parts.qweight, parts.group_scale, params.orig_shape[1])
        weight = dequantize_weight(codes, parts.weight_scale, torch.float32)
        return (weight if parts.branch is None else weight + _dense(parts.branch)).to(params.orig_dtype)

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        return {"has_sums": qtensor.params.has_sums, "branch": unpack(qtensor).branch}

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        parts = unpack(qtensor)
        return parts.qweight, parts.weight_scale, parts.group_scale

    @classmethod
    def views(cls, qdata: Tensor, params: Int8Layout.Params) -> WeightParts:
        N, K = params.orig_shape
        blocks = -(-K // CHANNELS_PER_BLOCK)
        codes = N * blocks * GROUP_SIZE  # a multiple of 64 bytes: no padding follows
        (scale, group_scale, sums), end = _words(qdata, codes, [N, N * blocks, N if params.has_sums else 0])
        return WeightParts(
            qdata[:codes].view(torch.uint8).view(N, -1),
            scale.view(torch.float32),
            sums if params.has_sums else None,
            None,
            group_scale.view(blocks, N),
            _branch_in(qdata, end, params) if params.rank else None,
        )


register_layout_class(INT4_LAYOUT, Int4Layout)


def make_int4_weight(layer: QuantizedLayer, has_sums: bool, dtype: torch.dtype) -> QuantizedTensor:
    """The live weight of a stored layer with 4-bit weights. Arguments: as of layouts.make_weight."""
    branch = None if layer.branch_down is None else LowRankBranch(layer.branch_down, layer.branch_up)
    packed = _pack(layer.qweight, layer.weight_scale, paired_scales(layer.group_scale), has_sums, branch)
    rank = 0 if branch is None else branch.down.shape[0]
    return QuantizedTensor(packed, INT4_LAYOUT, Int4Layout.Params(dtype, layer.weight_shape, has_sums, rank=rank))


def _pack(qweight: Tensor, weight_scale: Tensor, group_scale: Tensor, has_sums: bool, branch: LowRankBranch | None) -> Tensor:
    parts = [qweight, weight_scale.float(), group_scale]
    if has_sums:
        parts.append(sums_of_codes(qweight, group_scale=group_scale))
    return joined(parts if branch is None else [*parts, branch.down.to(qweight.device), branch.up.to(qweight.device)])


def _dense(branch: LowRankBranch) -> Tensor:
    return branch.up.float() @ branch.down.float()


def _branch_in(buffer: Tensor, start: int, params: Int8Layout.Params) -> LowRankBranch:
    """The fp16 factors from `start` on."""
    (N, K), R = params.orig_shape, params.rank
    second = start + Int8Layout.aligned(2 * R * K)
    down, up = buffer[start : start + 2 * R * K], buffer[second : second + 2 * N * R]
    return LowRankBranch(down.view(torch.float16).view(R, K), up.view(torch.float16).view(N, R))


def _words(buffer: Tensor, start: int, counts: list[int]) -> tuple[list[Tensor], int]:
    """Runs of so many int32 values one after the other, each padded to the buffer's alignment, and where they end."""
    found = []
    for count in counts:
        found.append(buffer[start : start + 4 * count].view(torch.int32))
        start += Int8Layout.aligned(4 * count)
    return found, start
