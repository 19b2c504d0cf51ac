"""A skip connection that is joined only if somebody asks for it. Knows no layers; res_block.py reads both parts.

ComfyUI's UNet joins what a block gives with a stored skip by `torch.cat([h, skip], dim=1)`. Our blocks give their result as
Joinable, for which that makes a Joined: both tensors, and the concatenation at the first other use. What runs before the
joining (ControlNet, FreeU, any patch) finds ordinary values in h, and its results are ordinary tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# What may be asked of a Joined without making it.
_KNOWN = {getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "layout")}
_KNOWN |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.get_device, Tensor.is_floating_point}


class Joinable(Tensor):
    """A tensor like any other; only torch.cat with a second one, along the channels of images, gives a Joined."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.cat and (parts := _two_images(args, kwargs)) is not None:
            return Joined(*parts)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


class Joined(Tensor):
    """The concatenation of two images along the channels, made when it is first used as a tensor, and then kept."""

    first: Tensor
    second: Tensor
    made: Tensor | None

    @staticmethod
    def __new__(cls, first: Tensor, second: Tensor) -> Joined:
        B, C, H, W = first.shape
        shape = (B, C + second.shape[1], H, W)
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=first.dtype, device=first.device)
        self.first, self.second, self.made = first, second, None
        return self

    def __init__(self, first: Tensor, second: Tensor) -> None:
        """first, second: (B, C_i, H, W) of one dtype and device."""

    def whole(self) -> Tensor:
        """What torch.cat would have given."""
        if self.made is None:
            self.made = torch.cat((self.first, self.second), 1)
        return self.made

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _KNOWN:
                return func(*args)
            return func(*_made(args), **_made(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        return func(*_made(args), **_made(kwargs or {}))


class JoinableOutput:
    """Bound over the forward of a block's last layer, whose result is going to be joined with a skip."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = self._forward(*args, **kwargs)
        if torch.compiler.is_compiling() or type(y) is not Tensor or y.ndim != 4 or (torch.is_grad_enabled() and y.requires_grad):
            return y
        return y.as_subclass(Joinable)


def plain(x: Tensor) -> Tensor:
    """x as an ordinary tensor: a Joined is made."""
    if isinstance(x, Joined):
        return x.whole()
    return x.as_subclass(Tensor) if isinstance(x, Joinable) else x


def parts_of(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The two images of a Joined that has not been made; else x itself, as an ordinary tensor, and None."""
    if isinstance(x, Joined) and x.made is None:
        return x.first, x.second
    return plain(x), None


def _two_images(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The operands of torch.cat([first, second], dim=1) as ordinary tensors; None of any other concatenation."""
    tensors = args[0] if args else kwargs.get("tensors")
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if dim != 1 or "out" in kwargs or not isinstance(tensors, list | tuple) or len(tensors) != 2:
        return None
    if not all(type(x) in (Tensor, Joinable) and x.ndim == 4 for x in tensors):
        return None
    first, second = (plain(x) for x in tensors)
    alike = first.dtype == second.dtype and first.device == second.device and first.shape[0] == second.shape[0]
    tracked = torch.is_grad_enabled() and (first.requires_grad or second.requires_grad)
    return (first, second) if alike and not tracked and first.shape[2:] == second.shape[2:] else None


def _made(value: Any) -> Any:
    """With every Joined in it made."""
    if isinstance(value, Joined):
        return value.whole()
    if type(value) in (list, tuple):
        return type(value)(_made(part) for part in value)
    return {key: _made(part) for key, part in value.items()} if type(value) is dict else value
