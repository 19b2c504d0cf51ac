"""What torch.compile sees of a quantized model: one operation for each layer, and one for the timestep tap. Compiles nothing.

Traced into, a layer is hundreds of operations (13,600 in a UNet of 8 M parameters), and guards on its weight and LoRA branch
would compile the whole UNet again for every LoRA. The operations look their module up when they run, so a
compiled graph holds no weights: LoRAs, low VRAM and weight functions work as they do without it.
"""

from __future__ import annotations

import itertools
import re
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor


class Layer(Protocol):
    """What the `layer` operation needs of a module. memory_format: of its result in a compiled graph, whichever way it runs."""

    memory_format: torch.memory_format

    def run(self, x: Tensor, bucket: Tensor) -> Tensor: ...

    def output_of(self, x: Tensor) -> Tensor:
        """Empty, of the shape and dtype of `run`'s result."""


class Tap(Protocol):
    """What the `bucket` operation needs of a timestep tap."""

    bucket: Tensor

    def update(self, embedding: Tensor) -> None: ...


# A name per copy of this module: ComfyUI may load the pack beside an installed one.
_NAMESPACE = "stepquant_" + re.sub(r"\W", "_", __name__)
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")
_owners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def number(owner: Layer | Tap) -> int:
    """What stands for `owner` in a compiled graph. A copy of the owner needs a number of its own."""
    chosen = next(_numbers)
    _owners[chosen] = owner
    return chosen


def _layer(x: Tensor, bucket: Tensor, owner: int) -> Tensor:
    module = _owners[owner]
    return module.run(x, bucket).contiguous(memory_format=module.memory_format)


def _layer_shape(x: Tensor, bucket: Tensor, owner: int) -> Tensor:
    module = _owners[owner]
    return module.output_of(x).contiguous(memory_format=module.memory_format)


def _bucket(embedding: Tensor, owner: int) -> Tensor:
    tap = _owners[owner]
    tap.update(embedding)
    return tap.bucket.clone()  # an operation's result may not be a tensor that lives on


def _bucket_shape(embedding: Tensor, owner: int) -> Tensor:
    return embedding.new_empty(embedding.shape[:1], dtype=torch.int64)


def _define(name: str, schema: str, run: Any, shape: Any) -> Any:
    # A CUDA graph of somebody else's would replay the weights of its recording.
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
    _LIBRARY.define(name + schema, tags=() if unsafe is None else (unsafe,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", shape, lib=_LIBRARY)
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


layer = _define("layer", "(Tensor x, Tensor bucket, int owner) -> Tensor", _layer, _layer_shape)
bucket = _define("bucket", "(Tensor embedding, int owner) -> Tensor", _bucket, _bucket_shape)
