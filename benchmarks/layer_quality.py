"""Which layers lose quality: each quantized layer's output on the float model's own input. Knows nothing of the sampler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from quality_measure import Candidate
from torch import Tensor, nn

from stepquant.hosts.diffusers.timestep_tap import TimestepTap
from stepquant.hosts.diffusers.trajectory import Trajectory, UNetCall, replay
from stepquant.hosts.key_mapping import ldm_to_diffusers
from stepquant.quant.sqnr import StepSqnr


def layer_sqnr(float_unet: nn.Module, candidate: Candidate, calls: Sequence[UNetCall]) -> dict[str, float]:
    """SQNR of every quantized layer's output, in dB, energies summed over the calls; worst layer first.

    Both layers get the input that the float UNet computes, so that a layer answers for its own noise alone.
    """
    meters: dict[str, StepSqnr] = defaultdict(StepSqnr)
    tap = TimestepTap(float_unet)

    def compare(name: str, layer: nn.Module):
        def after_layer(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            candidate.tap.bucket = tap.bucket
            meters[name].add(0, output, layer(args[0]))

        return after_layer

    handles = []
    for name in candidate.layers:
        path = ldm_to_diffusers(name)
        layer = candidate.unet.get_submodule(path)
        if hasattr(layer, "counter"):  # quantized, or simulated to be
            handles.append(float_unet.get_submodule(path).register_forward_hook(compare(name, layer)))
    try:
        for _ in replay(float_unet, Trajectory(list(calls))):
            pass
    finally:
        tap.remove()
        for handle in handles:
            handle.remove()
    return dict(sorted(((name, meter.mean_db()) for name, meter in meters.items()), key=lambda entry: entry[1]))
