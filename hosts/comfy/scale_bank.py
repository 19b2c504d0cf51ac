"""The factors in use on the scales of one quantized model, chosen on the device by the timestep of each UNet call. Reads no files.

Layers never see the factors: they are given scales, and norms their weight and bias, already multiplied. While weights are held
in place so are the products, made anew at the start of each call by a handful of launches for all layers together: no address
changes, so fused blocks and CUDA graphs work as without. Weights stay codes.
A call uses one expert, that of its first sample: ComfyUI's samplers give all samples of a call the same timestep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...quant.tuning.scale_set import ScaleSet, expert_of, stacked

Stack = tuple[tuple[ScaleSet, float], ...]


@dataclass
class _Held:
    """product = source * factor, source being where ComfyUI keeps it. All of one dtype."""

    source: Tensor
    factor: Tensor
    product: Tensor


class _Together:
    """Products that are made by a few launches."""

    def __init__(self, held: Sequence[_Held]) -> None:
        """held: of one dtype."""
        self._products = [one.product for one in held]
        self._sources, self._factors = [one.source for one in held], [one.factor for one in held]

    def multiply(self) -> None:
        torch._foreach_copy_(self._products, self._sources)
        torch._foreach_mul_(self._products, self._factors)


class ScaleBank:
    """One per model. stack: the scale sets in use, with their strengths."""

    def __init__(self, stack: Stack, device: torch.device) -> None:
        self.stack = stack
        self._experts, out, into = stacked(stack)
        tables = {**out, **into}
        widths = [table.shape[1] for table in tables.values()]
        ends = torch.tensor(widths).cumsum(0).tolist()
        self._span = {name: (end - width, end) for name, width, end in zip(tables, widths, ends, strict=True)}
        with torch.inference_mode(False):  # plain tensors: ones born in inference mode could not be updated outside of it
            self._table = torch.cat([table.expand(self._experts, -1) for table in tables.values()], 1).to(device)  # (E, all)
            self._now = self._table[:1].clone()
            self._rounded: dict[torch.dtype, Tensor] = {}
        self._held: dict[tuple[str, str], _Held] = {}
        self._together: list[_Together] | None = None  # _held by dtype, as torch takes them: sorted out when it has changed

    def tensors(self) -> tuple[Tensor, ...]:
        """What a recorded `follow` reads and writes, by address."""
        held = [tensor for one in self._held.values() for tensor in (one.factor, one.product)]
        return self._table, self._now, *self._rounded.values(), *held

    def __contains__(self, name: str) -> bool:
        return name in self._span

    def multiplied(self, name: str, tensor: Tensor) -> Tensor:
        """A layer's scale, a norm's weight, bias or output, (..., width), for one use."""
        return tensor * self._factor(name, tensor.dtype).to(tensor.device)

    def hold(self, name: str, part: str, tensor: Tensor) -> Tensor:
        """The same, kept in one place and followed as long as weights are held. part: what the tensor is of the layer."""
        self._be_on(tensor.device)
        with torch.inference_mode(False), torch.no_grad():
            product = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            self._held[name, part] = held = _Held(tensor, self._factor(name, tensor.dtype), product)
            self._together = None
            _Together([held]).multiply()
        return product

    def forget(self) -> None:
        """Weights are held no longer."""
        self._held.clear()
        self._together = None

    @torch.no_grad()
    def follow(self, bucket: Tensor) -> None:
        """A UNet call begins. bucket: (B,) int64 on its device; read there, no host sync."""
        self._be_on(bucket.device)
        if self._experts > 1:
            torch.index_select(self._table, 0, expert_of(bucket[:1], self._experts), out=self._now)
            for rounded in self._rounded.values():
                rounded.copy_(self._now)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """What is held may have got other contents in its place."""
        if self._together is None:
            held = list(self._held.values())
            dtypes = {one.source.dtype for one in held}
            self._together = [_Together([one for one in held if one.source.dtype is dtype]) for dtype in dtypes]
        for together in self._together:
            together.multiply()

    def _factor(self, name: str, dtype: torch.dtype) -> Tensor:
        """A view, (width,)."""
        now = self._now
        if dtype is not torch.float32:
            if dtype not in self._rounded:
                with torch.inference_mode(False):
                    self._rounded[dtype] = self._now.to(dtype)
            now = self._rounded[dtype]
        start, end = self._span[name]
        return now[0, start:end]

    def _be_on(self, device: torch.device) -> None:
        """The UNet's own device: what is held elsewhere is not in use any more."""
        if self._table.device == device:
            return
        with torch.inference_mode(False), torch.no_grad():
            self._table, self._now = self._table.to(device), self._now.to(device)
            self._rounded.clear()
        self.forget()
