"""What QuEST's fine-tuning will take, before it starts. Runs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ...quant.layers import LayerSpec
from ...quant.recipe import Recipe
from ...quant.rounding.tuned import COPIES
from ..key_mapping import ldm_to_diffusers
from .quest import FEED_FORWARD, TIME, Quest
from .reconstruct_cost import tokens_at
from .trajectory import SPREAD

# A training step is a forward and about as much again for the gradients of the inputs and of the weights in training; and another
# forward where activations are computed anew.
PASSES_PER_STEP, RECOMPUTED = 2.5, 1.0
PASSES = 3  # over all calls: what they were before, after, and the float UNet's layers
# fp16 or fp32 values that a transformer block or ResBlock holds for its gradients, in units of its output: 4 of attention's
# projections twice, GEGLU's 12, norms, additions.
VALUES_PER_BLOCK = 28
PROMPT_TOKENS = 77
STATE_COPIES = 3  # of what is trained, in a cancelled run's file


@dataclass(frozen=True)
class QuestCost:
    """parts, values: that are trained one after the other, and how many weights together. unet_calls: to record, for one batch each.

    operations: floating-point operations of the training. memory_bytes: on the UNet's device beside the quantized UNet, the float one
    put aside. ram_bytes: of what waits there on a GPU's behalf. disk_bytes: of the folder.
    """

    parts: int
    values: int
    unet_calls: int
    operations: float
    memory_bytes: int
    ram_bytes: int
    disk_bytes: int

    def seconds(self, operations_per_second: float) -> float:
        """Of the training alone: recording not included."""
        return self.operations / operations_per_second


def quest_cost(
    unet: nn.Module, recipe: Recipe, layers: Mapping[str, LayerSpec], parts: Mapping[str, Sequence[str]], prompts: int, how: Quest
) -> QuestCost:
    """layers: all quantizable ones (layers.find_layers). parts: from quest_parts, those that are done already left out."""
    batches = -(-prompts // how.batch_size)
    samples, calls = how.batch_size * (2 if how.sampling.guidance > 1 else 1), batches * how.calls
    sizes = {name: spec.shape[0] * spec.in_channels for name, spec in layers.items() if recipe.schemes.get(name, None) is not None}
    rows = {name: _rows(unet, name) for name in layers}
    macs = sum(rows[name] * _weights(spec) for name, spec in layers.items())
    passes = how.training.steps * (PASSES_PER_STEP + (RECOMPUTED if how.exact else 0)) + PASSES * calls
    item = unet.dtype.itemsize
    largest = max(sum(sizes[name] for name in part) for part in parts.values())
    held, block = _activations(unet, rows, layers)
    activations = held + VALUES_PER_BLOCK * block if how.exact else VALUES_PER_BLOCK * held
    floats = 0 if how.exact else sum(_weights(spec) for spec in layers.values())
    own = [name for part in parts.values() for name in part if not name.endswith(FEED_FORWARD[0])]
    targets = max(sum(rows[name] * layers[name].shape[0] for name in part if name in own) for part in parts.values())
    return QuestCost(
        parts=len(parts),
        values=sum(sizes[name] for part in parts.values() for name in part),
        unet_calls=sum(how.sampling.steps + number % SPREAD for number in range(batches)),
        operations=2.0 * macs * samples * passes * len(parts),
        memory_bytes=4 * COPIES * largest + item * (samples * activations + floats),
        ram_bytes=sum(p.numel() for p in unet.parameters()) * item + item * calls * samples * targets,
        disk_bytes=sum(sizes[name] for name, scheme in recipe.schemes.items() if scheme.is_int4) + 4 * STATE_COPIES * largest,
    )


def _weights(spec: LayerSpec) -> int:
    kernel = spec.shape[2] * spec.shape[3] if spec.is_conv else 1
    return spec.shape[0] * spec.in_channels * kernel


def _rows(unet: nn.Module, name: str) -> int:
    """Rows of one sample that a layer multiplies, at the UNet's own resolution."""
    if name.endswith(TIME):
        return 1
    return PROMPT_TOKENS if ".attn2.to_k" in name or ".attn2.to_v" in name else tokens_at(unet, ldm_to_diffusers(name))


def _activations(unet: nn.Module, rows: Mapping[str, int], layers: Mapping[str, LayerSpec]) -> tuple[int, int]:
    """Values of one sample that blocks hand on: of all transformer blocks and ResBlocks together, and of the largest."""
    ends = (".ff.net.2", ".out_layers.3")
    sizes = [rows[name] * spec.shape[0] for name, spec in layers.items() if name.endswith(ends)]
    return sum(sizes), max(sizes, default=0)
