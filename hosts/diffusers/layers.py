"""A quantized layer as a torch module in the place of a Linear or Conv2d. The arithmetic is in hosts/compute.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from torch import Tensor, nn

from ...errors import ModelError
from ...kernels import dispatch
from ...kernels.dispatch import ChannelGroups, paired_scales
from ...quant.file_format import QuantizedLayer
from ...quant.layers import dynamic_low
from ...quant.mac_counter import MacCounter
from ...quant.scheme import Scheme
from .. import compute
from ..low_rank import LowRankBranch
from .timestep_tap import TimestepTap

# Their dtypes are a contract: `.half()` or `.to(dtype)` on the UNet must round neither fp32 scales, fp8 codes nor fp16 branches.
_KEPT_BUFFERS = ("qweight", "weight_scale", "act_scale", "branch_down", "branch_up")


class QuantizedModule(nn.Module):
    """Base of both kinds. Buffers are the parts of QuantizedLayer, by their names; bias has the UNet's dtype.

    counter: if set, told of every call's multiply-adds.
    """

    def __init__(self, name: str, scheme: Scheme, layer: QuantizedLayer, tap: TimestepTap) -> None:
        super().__init__()
        self.name = name
        self.scheme = scheme
        self.tap = tap
        self.counter: MacCounter | None = None
        for part, tensor in vars(layer).items():
            self.register_buffer(part, tensor)
        self._groups: ChannelGroups | None = None
        paired = None if layer.group_scale is None else paired_scales(layer.group_scale)
        self.register_buffer("paired_scale", paired, persistent=False)
        has_zero_point = layer.act_zero_point is not None or (not scheme.symmetric and dynamic_low(name) is not None)
        sums = compute.sums_of_codes(layer.qweight, self.groups, paired) if has_zero_point else None
        self.register_buffer("weight_sums", sums, persistent=False)

    @property
    def groups(self) -> ChannelGroups | None:
        """The kernels' tables of its channel groups, made at the first call on a device; None without groups."""
        if self.channel_order is not None and (self._groups is None or self._groups.order.device != self.channel_order.device):
            self._groups = dispatch.channel_groups(self.channel_order, self.channel_exponents, self.scheme.granularity)
        return self._groups

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        exact = {key: getattr(self, key) for key in _KEPT_BUFFERS}
        super()._apply(fn, recurse)
        for key, before in exact.items():
            after = getattr(self, key)
            if after is not None and after.dtype is not before.dtype:
                setattr(self, key, before.to(after.device))
        return self

    def stored(self) -> QuantizedLayer:
        """The layer as a file holds it; tensors are shared, not copied."""
        return QuantizedLayer(**{part.name: getattr(self, part.name) for part in fields(QuantizedLayer)})

    def _tensors(self) -> compute.LayerTensors:
        return compute.LayerTensors(
            name=self.name,
            scheme=self.scheme,
            qweight=self.qweight,
            weight_scale=self.weight_scale,
            bias=self.bias,
            weight_sums=self.weight_sums,
            act_scale=self.act_scale,
            act_zero_point=self.act_zero_point,
            counter=self.counter,
            groups=self.groups,
            group_scale=self.paired_scale,
            branch=None if self.branch_down is None else LowRankBranch(self.branch_down, self.branch_up),
        )

    def _bucket(self) -> Tensor:
        if self.tap.bucket is None:
            raise ModelError(f"{self.name}: called outside its UNet, so its timestep is unknown. Call the UNet it belongs to.")
        return self.tap.bucket


class QuantizedLinear(QuantizedModule):
    """(..., K) -> (..., N)."""

    def forward(self, x: Tensor) -> Tensor:
        return compute.linear(x, self._tensors(), self._bucket())


class QuantizedConv2d(QuantizedModule):
    """(B, Cin, H, W) -> (B, Cout, Ho, Wo), zero padding."""

    def __init__(self, name: str, scheme: Scheme, layer: QuantizedLayer, tap: TimestepTap, stride: int, padding: int) -> None:
        super().__init__(name, scheme, layer, tap)
        self.stride = stride
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return compute.conv2d(x, self._tensors(), self._bucket(), self.stride, self.padding)
