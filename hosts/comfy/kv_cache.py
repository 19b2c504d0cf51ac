"""Keys and values of cross-attention, which depend on the prompt alone: computed once per sampling run, not once per step.

What may be reused is decided by where a conditioning comes from, never by a tensor's address or by equal contents.
ComfyUI's `uuids` name the conditionings of a UNet call, but they do not vouch for them: a node may exchange or overwrite
a conditioning between steps, and an area is completed with another conditioning under the same name. So the sampler's
conditionings are looked at where each step takes them, in a CALC_COND_BATCH wrapper, and every change gets a new revision.
A call without revisions, from a node that runs the model itself or behind a wrapper that may edit its input, has no cache.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.conds import CONDCrossAttn
from comfy.ldm.modules.attention import CrossAttention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from .guard import Guard
from .ops import QuantizableOp

WRAPPER_KEY = "stepquant_conditionings"
OPTION = "stepquant_conditionings"  # in transformer_options
OWN_KEYS = "stepquant"
# Wrappers that see the context between the sampler and the blocks. PREDICT_NOISE's run before the conditionings are looked at.
INNER_WRAPPERS = (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
# Patches that may give a block another context, or its K and V.
PATCHES = {"attn2_patch", "forward_timestep_embed_patch"}
# Conditionings whose revision is remembered: prompt, negative prompt and a dozen areas.
MOST_CONDITIONINGS = 16
# Batches whose K and V are kept: prompt and negative prompt, together or apart. 51 MB each for SDXL with CFG.
MOST_ENTRIES = 2
_revisions = itertools.count(1)
_serials = itertools.count(1)


@dataclass(frozen=True, eq=False)
class Conditionings:
    """What one step's conditionings hold: uuid -> revision, equal only for equal contents. patches: which weights are patched."""

    revisions: Mapping[Hashable, int]
    patches: Hashable


class ConditioningWatch:
    """Numbers the contents of conditionings.

    A conditioning is known again by its uuid, its tensor object, which is held, and unchanged contents: comparing 77 tokens
    with a copy takes 0.1 ms, since ComfyUI keeps conditionings on the CPU. On a GPU it would wait for the device: there
    (--gpu-only) nothing is numbered.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, tuple[Tensor, Tensor, int]] = OrderedDict()

    def number(self, conds: Sequence[list[dict] | None], model_options: dict) -> dict[Hashable, int] | None:
        """uuid -> revision of all conditionings of a step; None if something may still change them, or weights, on the way."""
        if "model_function_wrapper" in model_options:
            return None
        revisions: dict[Hashable, int] = {}
        for cond in itertools.chain.from_iterable(group or () for group in conds):
            entry = cond.get("model_conds", {}).get("c_crossattn")
            if cond.get("hooks") is not None or type(entry) is not CONDCrossAttn or entry.cond.device.type != "cpu":
                return None
            revision = self._revision(cond["uuid"], entry.cond)
            if revisions.setdefault(cond["uuid"], revision) != revision:  # one name for two
                return None
        return revisions

    def _revision(self, uuid: Hashable, tensor: Tensor) -> int:
        known = self._known.get(uuid)
        if known is None or known[0] is not tensor or not torch.equal(known[1], tensor):
            known = self._known[uuid] = (tensor, tensor.clone(), next(_revisions))
        self._known.move_to_end(uuid)
        while len(self._known) > MOST_CONDITIONINGS:
            self._known.popitem(last=False)
        return known[2]


def watch(patcher: ModelPatcher) -> None:
    """Look at the conditionings of every step that this patcher or a clone of it samples."""
    patcher.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, WRAPPER_KEY)
    patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, WRAPPER_KEY, _note_conditionings)


def _note_conditionings(executor: Callable, model: nn.Module, conds: list, x: Tensor, timestep: Tensor, model_options: dict) -> Any:
    cache = getattr(getattr(model, "stepquant", None), "kv_cache", None)
    revisions = None if cache is None else cache.watch.number(conds, model_options)
    if revisions is not None:
        noted = Conditionings(revisions, getattr(model, "current_weight_patches_uuid", None))
        # A copy: only calls that come from these conditionings may carry the note.
        model_options = {**model_options, "transformer_options": {**model_options.get("transformer_options", {}), OPTION: noted}}
    return executor(model, conds, x, timestep, model_options)


@dataclass
class _Entry:
    """buffers: layer -> K and V, (B, tokens, heads * d). serial: new for new buffers. weights: of the projections at filling."""

    key: Hashable
    layout: Hashable
    buffers: dict[str, tuple[Tensor, Tensor]]
    serial: int
    weights: list[weakref.ref]
    branches: list


class CrossAttentionCache:
    """One per UNet. `open` decides for one UNet call, `lookup` serves its blocks, `close` ends it."""

    def __init__(self, unet: nn.Module) -> None:
        self.watch = ConditioningWatch()
        layers = {name: module for name, module in unet.named_modules() if name.endswith(".attn2") and type(module) is CrossAttention}
        self._layers = {name: layer for name, layer in layers.items() if not _follow_timestep(layer.to_k, layer.to_v)}
        self._projections = [projection for layer in self._layers.values() for projection in (layer.to_k, layer.to_v)]
        self._guards = [Guard(layer, (), ("to_k", "to_v")) for layer in self._layers.values()]
        self._entries: list[_Entry] = []
        self._open: _Entry | None = None

    def open(self, transformer_options: dict, context: Tensor | None) -> Hashable | None:
        """Decide whether this UNet call may use the cache, and fill it if its conditionings are new.

        Args: context: (B, tokens, width), what the UNet's blocks will be given.
        Returns: a key that changes whenever the buffers' addresses or shapes do; None if the call has no cache.
        """
        self._open = None
        key = None if context is None or not self._layers else self._key(transformer_options, context)
        if key is None or any(guard.is_foreign() for guard in self._guards):
            return None
        entry = next((entry for entry in self._entries if entry.key == key and self._has_same_weights(entry)), None)
        self._open = entry = self._fill(key, transformer_options[OPTION], context) if entry is None else entry
        self._entries.remove(entry)
        self._entries.append(entry)  # the last one is the youngest
        return entry.serial, entry.layout

    def lookup(self, layer: str) -> tuple[Tensor, Tensor] | None:
        """K and V of a CrossAttention by its name in the UNet; None if they are to be computed."""
        return None if self._open is None else self._open.buffers.get(layer)

    def close(self) -> None:
        self._open = None

    def clear(self) -> None:
        """Free the buffers: the model is unloaded."""
        self._entries.clear()
        self._open = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for entry in self._entries for pair in entry.buffers.values() for tensor in pair)

    def _key(self, options: dict, context: Tensor) -> Hashable | None:
        noted, uuids, order = options.get(OPTION), options.get("uuids"), options.get("cond_or_uncond")
        if noted is None or not uuids or not order or len(uuids) != len(order) or _is_edited(options):
            return None
        if any(uuid not in noted.revisions for uuid in uuids):
            return None
        revisions = tuple(noted.revisions[uuid] for uuid in uuids)
        return tuple(uuids), revisions, tuple(order), context.shape, context.dtype, context.device, noted.patches

    def _has_same_weights(self, entry: _Entry) -> bool:
        """Whether the projections' weights and branches are the very objects that the entry was made with."""
        return all(
            weight() is layer._parameters["weight"] and branch is getattr(layer, "branch", None)
            for weight, branch, layer in zip(entry.weights, entry.branches, self._projections, strict=True)
        )

    def _fill(self, key: Hashable, noted: Conditionings, context: Tensor) -> _Entry:
        layout = (context.shape, context.dtype, context.device)
        entry = self._place(key, layout, noted)
        entry.key = None  # until all layers are filled: an interrupted run leaves half of them
        for name, layer in self._layers.items():
            pair = layer.to_k(context), layer.to_v(context)
            if name not in entry.buffers:
                entry.buffers[name] = _plain_like(pair)
            for buffer, tensor in zip(entry.buffers[name], pair, strict=True):
                buffer.copy_(tensor)
        entry.weights = [weakref.ref(layer._parameters["weight"]) for layer in self._projections]
        entry.branches = [getattr(layer, "branch", None) for layer in self._projections]
        entry.key = key
        return entry

    def _place(self, key: Hashable, layout: Hashable, noted: Conditionings) -> _Entry:
        """Buffers to fill: those of weights or conditionings that are no more, new ones, or the oldest of their layout.

        Refilled in place, so that a CUDA graph which reads them stays valid.
        """
        fitting = [entry for entry in self._entries if entry.layout == layout]
        present = set(noted.revisions.values())
        stale = [entry for entry in fitting if entry.key in (None, key) or not present.issuperset(entry.key[1])]
        if stale or len(fitting) >= MOST_ENTRIES:
            return (stale or fitting)[0]
        if len(self._entries) >= MOST_ENTRIES:
            del self._entries[0]
        entry = _Entry(None, layout, {}, next(_serials), [], [])
        self._entries.append(entry)
        return entry


def _is_edited(options: dict) -> bool:
    """Whether a patch or a wrapper stands between the conditionings and the blocks."""
    patches, replaced, wrappers = options.get("patches", {}), options.get("patches_replace", {}), options.get("wrappers", {})
    if not PATCHES.isdisjoint(patches) or replaced.get("attn2"):
        return True
    return any(found and not str(key).startswith(OWN_KEYS) for kind in INNER_WRAPPERS for key, found in wrappers.get(kind, {}).items())


def _follow_timestep(*projections: nn.Module) -> bool:
    """Whether a projection's result depends on the timestep too: stored scales do."""
    return any(isinstance(one, QuantizableOp) and one.scheme.is_static for one in projections)


def _plain_like(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # Plain tensors: ones born in inference mode could not be refilled outside of it.
    with torch.inference_mode(False):
        return tuple(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in tensors)
