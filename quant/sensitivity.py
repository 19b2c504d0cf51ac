"""How much of a layer's output noise reaches the UNet's output, measured by adding noise. Runs no model (see hosts/sensitivity.py)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .layers import needs_row_scales

# Energy of the noise added to a layer's input, relative to the input: well above fp16's rounding and still a small change.
PROBE_NOISE = 1e-3
# The ends are where sensitivity is most unlike; a bucket or two inside them, so that every sampler comes by.
FIRST_PROBE, LAST_PROBE = 60, 4
# A deep UNet's transformer blocks that follow each other are probed together above this many layers: SDXL's 794 become 204.
MOST_SINGLE_PROBES = 300
_BLOCK_INDEX = re.compile(r"\.transformer_blocks\.\d+\.")


@dataclass
class LayerSensitivity:
    """buckets: (P,) int64, ascending, where it was probed. gain: (P,) fp32, relative noise energy of the UNet's output per
    relative noise energy of the layer's output. energy_ratio: (P,) fp32, energy of an output row over that of an input row
    (rows: tokens or pixels)."""

    buckets: Tensor
    gain: Tensor
    energy_ratio: Tensor

    def at(self, buckets: Tensor) -> tuple[Tensor, Tensor]:
        """gain and energy_ratio in other buckets, (V,) float64 each: linear in the logarithm, level beyond the ends."""
        return _interpolated(self.buckets, self.gain, buckets), _interpolated(self.buckets, self.energy_ratio, buckets)


@dataclass
class SensitivityRecord:
    """Collects the probes of one layer."""

    buckets: list[int] = field(default_factory=list)
    gain: list[float] = field(default_factory=list)
    energy_ratio: list[float] = field(default_factory=list)

    def add(self, bucket: int, gain: float, energy_ratio: float) -> None:
        self.buckets.append(bucket)
        self.gain.append(gain)
        self.energy_ratio.append(energy_ratio)

    def sensitivity(self) -> LayerSensitivity:
        order = torch.tensor(self.buckets).argsort()
        return LayerSensitivity(*(torch.tensor(values)[order] for values in (self.buckets, self.gain, self.energy_ratio)))


def probe_buckets(probes: int) -> list[int]:
    """Buckets after which to probe, descending as sampling goes: evenly from the noisy end of the schedule to the clean one."""
    span = FIRST_PROBE - LAST_PROBE
    return [FIRST_PROBE - round(span * part / max(1, probes - 1)) for part in range(probes)]


def probe_groups(layers: Iterable[str]) -> list[list[str]]:
    """Layers that are probed together: each alone, or the same layer of successive transformer blocks in a deep UNet."""
    layers = list(layers)
    if len(layers) <= MOST_SINGLE_PROBES:
        return [[name] for name in layers]
    groups: dict[str, list[str]] = {}
    for name in layers:
        groups.setdefault(_BLOCK_INDEX.sub(".transformer_blocks.", name), []).append(name)
    return list(groups.values())


def input_noise(layer: str, x: Tensor, generator: torch.Generator) -> Tensor:
    """White noise of x's shape and dtype, PROBE_NOISE of its energy: what rounding to one scale adds.

    A layer with a scale per row gets it in proportion to each row: (..., rows, C).
    """
    # Drawn on the CPU, so that a seed means the same on every device.
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    size = x.float().square().mean(-1, keepdim=True) if needs_row_scales(layer) else x.float().square().mean()
    return (noise * (size * PROBE_NOISE).sqrt()).to(x.dtype)


def merge_sensitivity(first: LayerSensitivity, second: LayerSensitivity) -> LayerSensitivity:
    """Both runs' probes; those of the same bucket are averaged in the logarithm."""
    buckets = torch.cat([first.buckets, second.buckets])
    merged, place = buckets.unique(return_inverse=True)
    count = torch.zeros(len(merged)).index_add_(0, place, torch.ones(len(buckets)))

    def mean(part: str) -> Tensor:
        logs = torch.cat([getattr(first, part), getattr(second, part)]).clamp_min(1e-30).log()
        return (torch.zeros(len(merged)).index_add_(0, place, logs) / count).exp()

    return LayerSensitivity(merged, mean("gain"), mean("energy_ratio"))


def _interpolated(known: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    logs = np.log(np.maximum(values.double().numpy(), 1e-30))
    return torch.from_numpy(np.exp(np.interp(wanted.double().numpy(), known.double().numpy(), logs)))
