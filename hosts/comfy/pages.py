"""The virtual memory in which ComfyUI's dynamic VRAM (comfy-aimdo) keeps the weights of a model. Knows pages and layers, no graph.

A weight keeps its address for as long as the model is loaded, but its pages can be taken away whenever VRAM is short.
Faulting a range pins its pages and returns a signature, one serial number per page: an equal signature means that
nothing was taken since. ComfyUI compares it per layer; here the whole model is one range, so that asking costs one call.
"""

from __future__ import annotations

from collections.abc import Sequence

import comfy.ops
import comfy_aimdo.model_vbar as vbar
from torch import Tensor, nn

DO_NOT_FIT = "the model's weights do not all fit into free VRAM"


class Pages:
    """The pages of all layers of one model on one GPU."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """modules: those that ComfyUI gave a place (`_v`), all of one model."""
        self._modules = modules
        start = min(module._v[1] for module in modules)
        end = max(module._v[1] + module._v[2] for module in modules)
        self._block = (modules[0]._v[0], start, end - start)
        self._known: object | None = None
        self._pinned = False

    def holds(self, module: nn.Module) -> bool:
        """Whether the layer has a place here; small ones lie in ordinary memory."""
        return hasattr(module, "_v")

    def covers_the_same(self, other: Pages | None) -> bool:
        """Whether both stand for the same layers at the same places."""
        return other is not None and self._block == other._block and self._modules == other._modules

    def pin(self) -> bool:
        """Pin all pages, if none was taken away since `fill`. Otherwise nothing is pinned."""
        if self._known is None:
            return False
        signature = vbar.vbar_fault(self._block)
        if signature is None:
            return False
        self._pinned = True
        if not vbar.vbar_signature_compare(signature, self._known):
            self.unpin()
        return self._pinned

    def fill(self, like: Tensor) -> str | None:
        """Bring all weights in and pin them.

        Args:
            like: has the device and dtype that the UNet computes in.
        Returns: None, or why it could not be done; then nothing is pinned.
        """
        # ComfyUI forgets the signature of a layer whose patches have changed.
        if all(module._v_signature is not None for module in self._modules) and self.pin():
            return None
        self._known = None
        for module in self._modules:
            with fetch(module, like):
                pass
            if module._v_signature is None:
                return DO_NOT_FIT
        signature = vbar.vbar_fault(self._block)
        if signature is None:
            return DO_NOT_FIT
        self._pinned = True
        # Bringing in the last layers can have pushed out the first ones.
        if not all(map(_is_resident, self._modules)):
            self.unpin()
            return DO_NOT_FIT
        self._known = signature
        return None

    def unpin(self) -> None:
        """Work that is queued on the GPU may still read the pages: comfy-aimdo waits for the GPU before it takes any."""
        if self._pinned:
            vbar.vbar_unpin(self._block)
            self._pinned = False

    def tensors(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a layer at their place."""
        return module._v_weight, module._v_bias


def fetch(module: nn.Module, like: Tensor) -> comfy.ops.CastBiasWeightContext:
    """Weight and bias as the layer's own forward fetches them."""
    if getattr(module, "is_quantized", False):
        return module.fetch(like)
    return comfy.ops.CastBiasWeightContext(module, like, offloadable=True)


def find_pages(modules: Sequence[nn.Module]) -> Pages | None:
    """None if the model is not under dynamic VRAM."""
    placed = [module for module in modules if hasattr(module, "_v")]
    return Pages(placed) if placed else None


def _is_resident(module: nn.Module) -> bool:
    signature = vbar.vbar_fault(module._v)
    if signature is None:
        return False
    vbar.vbar_unpin(module._v)
    return vbar.vbar_signature_compare(signature, module._v_signature)
