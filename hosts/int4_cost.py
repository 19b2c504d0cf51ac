"""What rounding a file's 4-bit weights will take on this computer, before it starts. Rounds nothing."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

from ..quant.int4 import can_be_int4
from ..quant.layers import find_layers
from ..quant.rounding.method import RoundingCost, RoundingMethod, rounding_cost
from .checkpoint_file import open_checkpoint

SIDE, REPEATS = 1024, 3
# Of a matrix product's speed: GPTQ's steps from channel to channel wait for memory.
SHARE_REACHED = 0.25


def file_rounding_cost(method: RoundingMethod, source: str | Path) -> tuple[RoundingCost, float]:
    """The cost for a checkpoint or UNet file, and an estimate in seconds on the CPU.

    Raises: FormatError or ModelError if the file cannot be read or is no SDXL.
    """
    with open_checkpoint(source) as file:
        layers = find_layers(file.unet_shapes())
    cost = rounding_cost(method, {name: spec for name, spec in layers.items() if can_be_int4(spec.shape)})
    return cost, cost.seconds(SHARE_REACHED * matmul_speed())


def matmul_speed() -> float:
    """Floating-point operations per second of an fp32 matrix product on the CPU; takes some tenths of a second."""
    matrix = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    matrix @ matrix  # the first one starts threads
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return 2 * SIDE**3 / statistics.median(times)
