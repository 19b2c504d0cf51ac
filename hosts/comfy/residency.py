"""Keeps all weights of a UNet in place during one call, so that layers read them without asking ComfyUI, and tells whether they moved.

ComfyUI may move weights between any two steps: dynamic VRAM takes pages away, a classic load moves layers to the CPU.
So before every call `hold` compares with what was found last time. `version` counts the changes of any address: work
that has addresses baked in, such as a CUDA graph, is valid for one version only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..compute import LayerTensors
from ..fused import NormTensors
from . import pages as dynamic_vram
from .pages import Pages
from .scale_bank import ScaleBank

PARTLY_LOADED = "only part of the model is in VRAM"
EDITED = "a node edits weights while they are fetched"
EVICTED_TOO_OFTEN = "VRAM is so short that weights were taken away several times during this run"
# Below it a loss of pages is another model's load or a decode, above it every step would bring all weights in anew.
EVICTIONS_PER_LOAD = 3


class Lease:
    """held: while it is, no weight of the UNet moves and no other content appears in it."""

    def __init__(self) -> None:
        self.held = False


class ResidentWeight:
    """A quantized layer's tensors on the compute device; valid while the lease is held. Entered as what `borrow` returns."""

    def __init__(self, lease: Lease, tensors: LayerTensors) -> None:
        self.lease, self.tensors = lease, tensors

    def __enter__(self) -> LayerTensors:
        return self.tensors

    def __exit__(self, *_: object) -> None:
        pass


class ResidentNorm(ResidentWeight):
    """The same for a GroupNorm or LayerNorm: `tensors` are NormTensors. standing, block: of the transformer block it begins."""

    tensors: NormTensors
    standing: Hashable = None
    block: tuple = ()


class ResidentPlain:
    """The same for a layer that is not quantized, which has nothing to lend."""

    def __init__(self, lease: Lease, weight: Tensor, bias: Tensor | None) -> None:
        self.lease, self.weight, self.bias = lease, weight, bias

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        pass


class Residency:
    """One per UNet.

    `hold`, then `lend` if layers are to run (a graph replay needs no layer), then `release`; `let_go` when the run ends.
    """

    def __init__(self, unet: nn.Module, find_pages: Callable[[Sequence[nn.Module]], Pages | None] | None = None) -> None:
        self.lease = Lease()
        self.version = 0
        self._modules = [module for module in unet.modules() if module._parameters]
        self._find_pages = find_pages or dynamic_vram.find_pages
        self._pages: Pages | None = None
        self._settled_on: torch.device | None = None
        self._refusal: str | None = None
        self._evictions = 0
        self._places: list[tuple[dict, str, int]] = []
        self._watched: tuple = (([], []), ([], []))  # the same, tensors and codes apart: ([(dict, name)], [address]) each
        self._addresses: tuple[int, ...] = ()
        self._residents: list[tuple[nn.Module, object]] = []
        self._kept: dict[tuple[int, str], Tensor] = {}

    def invalidate(self) -> None:
        """Weights were loaded or patched: find out anew where they are."""
        self.let_go()
        self._settled_on, self._refusal, self._evictions = None, None, 0

    def clear(self) -> None:
        """The model is unloaded: hold on to nothing."""
        self._forget_residents()
        self._pages = None
        self._kept = {}
        self.invalidate()

    def refuse(self, reason: str) -> None:
        """Hold nothing until the weights are loaded anew."""
        self._forget_residents()
        self._refusal = reason

    def hold(self, like: Tensor) -> str | None:
        """Keep all weights where they are until `release`.

        Args:
            like: has the device and dtype that the UNet computes in.
        Returns: None, or why they cannot be kept; then nothing is held.
        """
        if self._refusal is None and not self._still_there(like.device):
            try:
                self._refusal = self._settle(like)
            except BaseException:
                self.release()
                raise
        self.lease.held = self._refusal is None
        return self._refusal

    def lend(self) -> None:
        """Let layers read their weights without asking ComfyUI. Only while held."""
        if not self._residents:
            layers = [(index, module) for index, module in enumerate(self._modules) if hasattr(module, "comfy_cast_weights")]
            self._residents = [(module, self._resident(index, module)) for index, module in layers]
            for module, resident in self._residents:
                module.__dict__["resident"] = resident

    def release(self) -> None:
        self.lease.held = False
        if self._pages is not None:
            self._pages.unpin()

    def let_go(self) -> None:
        """A sampling run is over. In a classic load a reference would keep the memory of a weight that ComfyUI moves to the CPU."""
        if self._pages is None:
            self._forget_residents()

    def _forget_residents(self) -> None:
        for module, _ in self._residents:
            module.__dict__.pop("resident", None)
        self._residents = []
        if (scales := self._scales()) is not None:
            scales.forget()

    def _still_there(self, device: torch.device) -> bool:
        if self._settled_on != device or not self._are_in_place():
            return False
        return self._pages is None or self._pages.pin()

    def _are_in_place(self) -> bool:
        """Asked before each call, of two thousand tensors: 0.3 ms, a third of what a question to each would take."""
        (plain, plain_addresses), (codes, code_addresses) = self._watched
        try:
            return [tensors[name].data_ptr() for tensors, name in plain] == plain_addresses and (
                [tensors[name]._qdata.data_ptr() for tensors, name in codes] == code_addresses
            )
        except (AttributeError, RuntimeError):  # taken away, or a weight of another kind now
            return False

    def _settle(self, like: Tensor) -> str | None:
        """Find where the weights are, having brought them in under dynamic VRAM. Returns why not, if not."""
        evicted = self._settled_on == like.device
        self.let_go()
        self._settled_on = None
        self._evictions += evicted
        if self._evictions > EVICTIONS_PER_LOAD:
            return EVICTED_TOO_OFTEN
        if any(getattr(module, f"{part}_function", None) for module in self._modules for part in ("weight", "bias")):
            return EDITED
        pages = self._find_pages(self._modules)
        if pages is None or not pages.covers_the_same(self._pages):
            self._forget_residents()
            self._pages = pages
        self._places = [place for module in self._modules for place in self._own_places(module)]
        self._watched = tuple(_watched(self._places, codes) for codes in (False, True))
        if any(tensors[name].device != like.device for tensors, name, _ in self._places):
            return PARTLY_LOADED
        if self._pages is not None:
            reason = self._pages.fill(like)
            if reason is not None:
                return reason
        self._note_addresses()
        if (scales := self._scales()) is not None:
            scales.refresh()
        self._settled_on = like.device
        return None

    def _scales(self) -> ScaleBank | None:
        """The factors on the weights, if any are in use."""
        return next((scales for module in self._modules if (scales := getattr(module, "scales", None)) is not None), None)

    def _own_places(self, module: nn.Module) -> list[tuple[dict, str, int]]:
        """Where a module's tensors are that are not in dynamic VRAM's pages."""
        paged = ("weight", "bias") if self._pages is not None and self._pages.holds(module) else ()
        tensors = [(group, name) for group in (module._parameters, module._buffers) for name in group]
        return [(group, name, _address(group[name])) for group, name in tensors if group[name] is not None and name not in paged]

    def _note_addresses(self) -> None:
        """Raise `version` if anything has moved."""
        if self._pages is None:
            addresses = tuple(address for *_, address in self._places)
        else:
            loose = any(getattr(module, "is_quantized", False) and not self._pages.holds(module) for module in self._modules)
            if loose or not self._renew_copies():
                self._forget_residents()
            self.lend()
            addresses = tuple(address for _, resident in self._residents for address in _addresses_in(resident))
        if addresses != self._addresses:
            self._addresses = addresses
            self.version += 1

    def _renew_copies(self) -> bool:
        """Copy what small tensors hold now. False if any has another shape than its copy: then nothing is copied."""
        sources = [getattr(self._modules[index], name) for index, name in self._kept]
        pairs = list(zip(self._kept.values(), sources, strict=True))
        if any(source is None or _kind(kept) != _kind(source) for kept, source in pairs):
            return False
        with torch.no_grad():
            for dtype in {kept.dtype for kept, _ in pairs}:  # one launch for many, where all are of one type
                kept, sources = zip(*((kept, source) for kept, source in pairs if kept.dtype is dtype), strict=True)
                torch._foreach_copy_(kept, sources)
        return True

    def _resident(self, index: int, module: nn.Module) -> object:
        in_pages = self._pages is not None and self._pages.holds(module)
        weight, bias = self._pages.tensors(module) if in_pages else (module.weight, module.bias)
        if not in_pages and not getattr(module, "is_quantized", False):
            weight = self._steady(index, "weight", weight)
        if not in_pages:
            bias = self._steady(index, "bias", bias)
        if getattr(module, "is_quantized", False):
            tables = [self._steady(index, name, getattr(module, name)) for name in ("act_scale", "act_zero_point")]
            tensors = module.tensors_of(weight, bias, *tables)
            if module.scales is not None:
                tensors.weight_scale = module.scales.hold(module.layer_name, "weight_scale", tensors.weight_scale)
                if tensors.branch is not None:
                    tensors.branch = tensors.branch.scaled(partial(module.scales.hold, module.layer_name, "branch_up"))
            return ResidentWeight(self.lease, tensors)
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            if module.scales is not None:
                weight, bias = (module.scales.hold(module.layer_name, *part) for part in (("weight", weight), ("bias", bias)))
            return ResidentNorm(self.lease, NormTensors(weight, bias, module.eps))
        return ResidentPlain(self.lease, weight, bias)

    def _steady(self, index: int, name: str, tensor: Tensor | None) -> Tensor | None:
        """The tensor itself in a classic load. Under dynamic VRAM a copy: every load, so every picture, makes the small
        tensors (norms, tables) anew somewhere else, and a graph would have to be captured again for each picture."""
        if tensor is None or self._pages is None:
            return tensor
        kept = self._kept.get((index, name))
        with torch.inference_mode(False), torch.no_grad():
            if kept is None or _kind(kept) != _kind(tensor):
                kept = self._kept[index, name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            kept.copy_(tensor)
        return kept


def _watched(places: Sequence[tuple[dict, str, int]], codes: bool) -> tuple[list, list]:
    found = [place for place in places if hasattr(place[0][place[1]], "_qdata") is codes]
    return [place[:2] for place in found], [address for *_, address in found]


def _kind(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else getattr(tensor, "_qdata", tensor).data_ptr()


def _addresses_in(resident: object) -> list[int]:
    tensors = getattr(resident, "tensors", resident)
    return [value.data_ptr() for value in vars(tensors).values() if isinstance(value, Tensor)]
