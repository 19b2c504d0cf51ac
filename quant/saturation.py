"""When stored scales no longer hold a layer's input: the limit on clipped values, and what is said of it. Reads no device.

A LoRA, a ControlNet, another resolution or sampler can take a layer's input beyond the range that calibration saw. Clipped
values are counted while they are quantized; above the limit a layer measures its input itself for the rest of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# Share of a layer's values in one step. Calibrated ranges are clipped where that helps, which is far below it: a tenth off
# the range of a normal distribution's million values clips one in 10,000.
DEFAULT_LIMIT = 0.01
MOST_LAYERS_NAMED = 4


@dataclass
class LayerSaturation:
    """One quantization of a layer's input. layers: whose inputs it makes, several if they share it. inputs: K.

    counters: (2,) int32 on the UNet's device, values clipped and rows quantized since they were read; None: nothing is counted.
    switched: the stored scales are not used for the rest of the run.
    """

    layers: list[str]
    inputs: int
    counters: Tensor | None = None
    switched: bool = False


@dataclass(frozen=True)
class Switch:
    """layers ran with dynamic scales from `step` on (0-based), because `share` of their values were clipped in the step before."""

    layers: tuple[str, ...]
    step: int
    share: float

    def __str__(self) -> str:
        return f"{', '.join(self.layers)} from step {self.step + 1} ({100 * self.share:.1f} % clipped)"


def describe_run(switches: Sequence[Switch]) -> str:
    """One run's switches in one line, those that were clipped most by name."""
    worst = sorted(switches, key=lambda switch: -switch.share)
    count = sum(len(switch.layers) for switch in switches)
    named = "; ".join(map(str, worst[:MOST_LAYERS_NAMED]))
    more = f"; and {len(worst) - MOST_LAYERS_NAMED} more" if len(worst) > MOST_LAYERS_NAMED else ""
    layers = "1 layer" if count == 1 else f"{count} layers"
    return f"{layers} left the calibrated range and ran on scales measured in each step: {named}{more}"
