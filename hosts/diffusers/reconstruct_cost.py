"""What block reconstruction will take, before it starts. Runs no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .reconstruct import Reconstruction
from .trajectory import SPREAD

# A training step is a forward and twice that for the gradients, of the inputs and of the places of weights.
PASSES_PER_STEP = 3
# Whole passes over the samples: inputs handed on in both UNets, targets, start, and the error before and after.
PASSES = 6
# fp32 copies of a block in training: weights, places, steps, moves and their gradients.
COPIES = 5


@dataclass(frozen=True)
class ReconstructionCost:
    """blocks: to be rounded. unet_calls: each for one batch of prompts; calls that stop at a block count as halves. operations:
    floating-point operations of the training. memory_bytes: of the samples and the largest block, beside the model."""

    blocks: int
    samples: int
    unet_calls: int
    operations: float
    memory_bytes: int

    def seconds(self, operations_per_second: float) -> float:
        """Of the training alone: UNet calls not included."""
        return self.operations / operations_per_second


def reconstruction_cost(unet: nn.Module, blocks: Mapping[str, Mapping[str, str]], prompts: int, how: Reconstruction) -> ReconstructionCost:
    """blocks: from reconstructed_layers, those that are done already left out."""
    batches = -(-prompts // how.batch_size)
    guided = 2 if how.sampling.guidance > 1 else 1
    samples = batches * how.calls * how.batch_size * guided
    steps = sum(how.sampling.steps + number % SPREAD for number in range(batches))
    entries = len({path.rpartition(".")[0] for path in blocks})  # in between, a block's outputs are the next one's inputs
    operations, largest = 0.0, 0
    rows = PASSES_PER_STEP * how.training.iterations * how.training.batch_size + PASSES * samples
    for path in blocks:
        tokens, block = tokens_at(unet, path), unet.get_submodule(path)
        weights = sum(parameter.numel() for parameter in block.parameters())
        operations += 2.0 * weights * tokens * rows
        kept = 4 * samples * tokens * block.norm1.normalized_shape[0] * unet.dtype.itemsize
        largest = max(largest, kept + 4 * COPIES * weights)
    return ReconstructionCost(len(blocks), samples, steps + batches * how.calls * entries, operations, largest)


def tokens_at(unet: nn.Module, path: str) -> int:
    """Rows of one sample at a diffusers path inside a block of the UNet, at the UNet's own resolution."""
    side, number = unet.config.sample_size, path.split(".")[1]
    levels = len(unet.config.block_out_channels)
    halvings = int(number) if path.startswith("down") else levels - 1 - int(number) if path.startswith("up") else levels - 1
    return (side >> halvings) ** 2
