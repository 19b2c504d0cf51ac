"""What rounding a file's weights will take on this computer, before it starts. Rounds nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..quant.int8_rounding import int8_rounding_cost
from ..quant.layers import find_layers
from ..quant.recipe import Recipe, preset_recipe
from ..quant.rounding.method import RoundingCost, RoundingMethod, rounding_cost
from .checkpoint_file import open_checkpoint

SIDE, REPEATS = 1024, 3
# Of a matrix product's speed: GPTQ's steps from channel to channel wait for memory.
SHARE_REACHED = 0.25


@dataclass(frozen=True)
class FileRounding:
    """cost: of the whole file. seconds: an estimate for this CPU. int4: layers with 4-bit weights. int8, int8_gptq: layers with 8-bit
    weights, and how many of them are not rounded plainly."""

    cost: RoundingCost
    seconds: float
    int4: int
    int8: int
    int8_gptq: int


def file_rounding(method: RoundingMethod, source: str | Path, preset: str | Recipe, has_moments: Callable[[str], bool]) -> FileRounding:
    """What is rounded how in a checkpoint or UNet file, and what it takes.

    Args: has_moments: whether a layer's 8-bit weights will be rounded by the moments of its input.
    Raises: FormatError or ModelError if the file cannot be read or is no SDXL; SchemeError if the preset is unknown.
    """
    with open_checkpoint(source) as file:
        layers = find_layers(file.unet_shapes())
    schemes = (preset if isinstance(preset, Recipe) else preset_recipe(preset, layers)).schemes
    known = {name: scheme for name, scheme in schemes.items() if name in layers}  # quantize_file says which one is not
    int4 = {name: layers[name] for name, scheme in known.items() if scheme.is_int4}
    int8 = [name for name, scheme in known.items() if not scheme.is_int4 and not scheme.is_fp8]
    by_moments = {name: layers[name] for name in int8 if has_moments(name)}
    found = [rounding_cost(method, int4, {name: known[name].rank for name in int4}), int8_rounding_cost(by_moments)]
    cost = RoundingCost(sum(one.operations for one in found), max(one.peak_bytes for one in found), sum(one.disk_bytes for one in found))
    return FileRounding(cost, cost.seconds(SHARE_REACHED * matmul_speed()), len(int4), len(int8), len(by_moments))


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
