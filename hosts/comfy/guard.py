"""Whether a block is still ComfyUI's own: no hook, replaced module or replaced forward in it. Knows no transformer_options."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable

from torch import nn


def is_stock(*classes: type[nn.Module]) -> bool:
    """Whether nobody has replaced the forward of these classes before we came."""
    return all(cls.forward.__module__ == cls.__module__ for cls in classes)


def forget_returned_forwards(module: nn.Module) -> None:
    """Take away forwards that are the class's own again, everywhere below `module`.

    Who replaces a forward and gives it back (LoraLoaderBypass after each run) leaves the class's on the instance. It is
    called all the same, but looks like a replaced one.
    """
    for each in module.modules():
        forward = vars(each).get("forward")
        if getattr(forward, "__self__", None) is each and forward.__func__ is type(each).forward:
            del each.forward


class Unowned:
    """A reference that a module's own forward may hold to it: an owning one would keep gigabytes until the next collection."""

    def __init__(self, module: nn.Module) -> None:
        self._reference = weakref.ref(module)

    def __call__(self) -> nn.Module:
        return self._reference()

    def __deepcopy__(self, memo: dict) -> Unowned:
        return Unowned(copy.deepcopy(self(), memo))  # the copy's module, which the memo holds


class Guard:
    """Made when a block is bound, asked at each of its calls.

    What a bound forward passes by is compared with what was there when it was bound: the modules below the block, their
    hooks (calibration's observers are hooks), their own forwards, and the classes' forwards.
    """

    def __init__(self, block: nn.Module, classes: Iterable[type[nn.Module]], below: Iterable[str] | None = None) -> None:
        """classes: whose forward the bound one stands for. below: paths of modules it passes by; None for all."""
        self._block, self._type = Unowned(block), type(block)
        self._forwards = [(cls, cls.forward) for cls in classes]
        paths = [name for name, _ in block.named_modules() if name] if below is None else below
        self._places = [_place(block, path) for path in paths]
        self._children = [siblings[name] for siblings, name in self._places]
        # A block inside this one is bound before it, and so has a forward of its own by now.
        self._own_forwards = [vars(child).get("forward") for child in self._children]
        # register_forward_hook fills these dictionaries; they live as long as their module.
        self._hooks = [hooks for child in self._children for hooks in (child._forward_hooks, child._forward_pre_hooks)]

    def is_foreign(self) -> bool:
        """Whether anything is not as it was: then the block's class must do the call."""
        return (
            any(self._hooks)
            or type(self._block()) is not self._type
            or [siblings.get(name) for siblings, name in self._places] != self._children
            or [child.__dict__.get("forward") for child in self._children] != self._own_forwards
            or any([cls.forward is not forward for cls, forward in self._forwards])
        )


def _place(block: nn.Module, path: str) -> tuple[dict, str]:
    """The dictionary in which a module below the block hangs, and its name there."""
    parent, _, name = path.rpartition(".")
    return block.get_submodule(parent)._modules, name
