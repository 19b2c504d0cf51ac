"""ComfyUI's GroupNorm and LayerNorm with weights that may stay in place and be tuned, and how blocks borrow these. Quantizes nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import comfy.ops
import torch.nn.functional as F
from torch import Tensor, nn

from ..fused import NormTensors
from .residency import ResidentNorm
from .scale_bank import ScaleBank

NOTHING = nullcontext()


class GroupNorm(comfy.ops.manual_cast.GroupNorm):
    resident: ResidentNorm | None = None
    scales: ScaleBank | None = None

    def forward(self, x: Tensor) -> Tensor:
        norm = resident_norm(self, x)
        if norm is not None:
            return F.group_norm(x, self.num_groups, norm.weight, norm.bias, norm.eps)
        y = super().forward(x)
        return y if self.scales is None else self.scales.multiplied(self.layer_name, y.transpose(1, -1)).transpose(1, -1)


class LayerNorm(comfy.ops.manual_cast.LayerNorm):
    resident: ResidentNorm | None = None
    scales: ScaleBank | None = None

    def forward(self, x: Tensor) -> Tensor:
        norm = resident_norm(self, x)
        if norm is not None:
            return F.layer_norm(x, self.normalized_shape, norm.weight, norm.bias, norm.eps)
        y = super().forward(x)
        return y if self.scales is None else self.scales.multiplied(self.layer_name, y)


class _BorrowedNorm:
    """A norm's tensors, fetched through ComfyUI on entering and given back on leaving."""

    def __init__(self, norm: nn.GroupNorm | nn.LayerNorm, x: Tensor) -> None:
        self._norm, self._x = norm, x

    def __enter__(self) -> NormTensors:
        self._fetched = comfy.ops.CastBiasWeightContext(self._norm, self._x, offloadable=True)
        norm, (weight, bias) = self._norm, self._fetched.__enter__()
        if norm.scales is not None:
            weight, bias = (norm.scales.multiplied(norm.layer_name, part) for part in (weight, bias))
        return NormTensors(weight, bias, norm.eps)

    def __exit__(self, *error: object) -> None:
        self._fetched.__exit__(*error)


def borrow_norm(norm: nn.Module, x: Tensor) -> AbstractContextManager[NormTensors | None]:
    """weight, bias (both (C,)) and eps of a GroupNorm or LayerNorm on x's device, for as long as the block runs.

    None if it has no weight or bias: then it must run its own forward. Weight functions are applied, as ComfyUI does.
    """
    if resident_norm(norm, x) is not None:
        return norm.resident
    return NOTHING if norm.weight is None or norm.bias is None else _BorrowedNorm(norm, x)


def resident_norm(norm: nn.Module, x: Tensor) -> NormTensors | None:
    resident = norm.resident
    usable = resident is not None and resident.lease.held and resident.tensors.weight is not None
    return resident.tensors if usable and resident.tensors.weight.dtype == x.dtype else None
