"""Runs a diffusers SDXL pipeline while observers watch every layer's input. The observers live for one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ...errors import CalibrationError
from ...quant.calibration import Calibration
from ...quant.layers import LayerSpec, check_is_sdxl, find_layers
from ...quant.observer import LayerObserver
from ..key_mapping import ldm_to_diffusers
from .quantize import unet_shapes
from .timestep_tap import TimestepTap
from .trajectory import Progress, Sampling, sample_latents


def calibrate(
    pipeline, prompts: Sequence[str], sampling: Sampling | None = None, batch_size: int = 2, progress: Progress | None = None
) -> Calibration:
    """Sample the prompts and record what every quantizable layer of the UNet is given.

    Memory is bounded: per layer 256 rows, and two ranges per input channel and visited bucket.
    Args:
        pipeline: an SDXL pipeline whose UNet is not quantized; left as it was, also after an error or a cancel.
        prompts: kinds of picture the quantized model will be asked for; 8 to 16 are usual.
        progress: called with (UNet calls done, UNet calls in all). Raising in it cancels.
    Raises: ModelError if the UNet is not SDXL's or quantized already; CalibrationError if there are no prompts.
    """
    if not prompts:
        raise CalibrationError("Calibrate: no prompts; at least one is needed. Usual is 8 to 16.")
    sampling = sampling or Sampling()
    shapes = unet_shapes(pipeline.unet)
    check_is_sdxl(shapes, "UNet")
    with _observed(pipeline, find_layers(shapes)) as observers:
        sample_latents(pipeline, prompts, sampling, batch_size, progress)
        statistics = {name: observer.statistics() for name, observer in observers.items()}
    seen = {name: statistic for name, statistic in statistics.items() if statistic is not None}
    return Calibration(seen, _summary(pipeline, prompts, sampling))


@contextmanager
def _observed(pipeline, layers: dict[str, LayerSpec]) -> Iterator[dict[str, LayerObserver]]:
    unet = pipeline.unet
    device = next(unet.parameters()).device
    tap = TimestepTap(unet)
    tap.follow(pipeline.scheduler)
    observers = {name: LayerObserver(spec.in_channels, device) for name, spec in layers.items()}
    handles = []
    try:
        for name, observer in observers.items():
            module = unet.get_submodule(ldm_to_diffusers(name))
            handles.append(module.register_forward_pre_hook(_watch(observer, tap)))
        yield observers
    finally:
        for handle in handles:
            handle.remove()
        tap.remove()


def _watch(observer: LayerObserver, tap: TimestepTap):
    def before_layer(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        rows = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x.reshape(x.shape[0], -1, x.shape[-1])  # (B, rows, C)
        observer.update(rows, tap.buckets)

    return before_layer


def _summary(pipeline, prompts: Sequence[str], sampling: Sampling) -> dict[str, object]:
    return {
        "engine": "diffusers",
        "prompts": list(prompts),
        "scheduler": type(pipeline.scheduler).__name__,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "seed": sampling.seed,
    }
