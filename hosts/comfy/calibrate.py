"""Calibrates a loaded SDXL: runs it with ComfyUI's sampler while observers watch every layer's input.

The observers live for one call: they are forward pre-hooks on the running model's layers, removed in `finally`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...errors import CalibrationError, ModelError
from ...quant.calibration import Calibration
from ...quant.layers import LayerSpec, check_is_sdxl, find_layers
from ...quant.observer import LayerObserver
from .attach import state_of
from .sampling import SEEDS, SamplerSettings, SamplingProgress, sample_latent
from .tap import TimestepTap


def calibrate(
    model: ModelPatcher, positive: list, negative: list, latent: dict, seed: int, settings: SamplerSettings, runs: int = 1
) -> Calibration:
    """Record what every quantizable layer of `model` is given while it makes `runs` pictures.

    Args:
        model: an SDXL that is not quantized, with whatever LoRAs and patches it carries; left as it was.
        seed: of the first run; the others count up from it.
        runs: sampling runs. Memory does not grow with it: 256 rows and 64 ranges a layer are kept at most.
    Raises: ModelError if the model is no SDXL or quantized already; CalibrationError if its layers could not be observed.
    """
    if state_of(model) is not None:
        raise ModelError("Calibrate: the model is quantized already. Connect the 16-bit model that it was made from.")
    unet = model.model.diffusion_model
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    check_is_sdxl(shapes, "Calibrate: the model")
    watch = _Watch(model)
    progress = SamplingProgress(runs, settings.steps)
    with _hooks(unet, find_layers(shapes), watch):
        for run in range(runs):
            sample_latent(model, positive, negative, latent, (seed + run) % SEEDS, settings, progress.callback(model))
    return Calibration(_statistics(watch.observers), _summary(latent, seed, settings, runs))


class _Watch:
    """The observers of one run, and the timestep bucket of each sample in the UNet call that is under way."""

    def __init__(self, model: ModelPatcher) -> None:
        self.observers: dict[str, LayerObserver] = {}
        # The same tap that quantized models read, so that calibration and use agree at the edges of buckets.
        self._tap = TimestepTap()
        self._tap.follow(model.get_model_object("model_sampling"))
        self._buckets = [0]

    def note_timesteps(self, embedding: Tensor) -> None:
        self._tap.observe(embedding)
        self._buckets = self._tap.bucket.tolist()

    def observe(self, layer: LayerSpec, x: Tensor) -> None:
        rows = x.flatten(2).transpose(1, 2) if layer.is_conv else x.reshape(x.shape[0], -1, x.shape[-1])  # (B, rows, C)
        if layer.name not in self.observers:
            self.observers[layer.name] = LayerObserver(layer.in_channels, rows.device)
        self.observers[layer.name].update(rows, _spread(self._buckets, rows.shape[0]))


def _spread(buckets: list[int], batch: int) -> list[int]:
    """Buckets for a layer whose batch is a multiple of the UNet's: Hypertile and others move tiles into the batch."""
    if batch % len(buckets):
        return [buckets[0]] * batch
    return [bucket for bucket in buckets for _ in range(batch // len(buckets))]


@contextmanager
def _hooks(unet: nn.Module, layers: Mapping[str, LayerSpec], watch: _Watch) -> Iterator[None]:
    handles = [unet.time_embed[0].register_forward_pre_hook(lambda _module, inputs: watch.note_timesteps(inputs[0]))]
    try:
        for name, module in unet.named_modules():
            if name in layers:
                handles.append(module.register_forward_pre_hook(_observing_hook(layers[name], watch)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observing_hook(layer: LayerSpec, watch: _Watch) -> Callable[[nn.Module, tuple], None]:
    return lambda _module, inputs: watch.observe(layer, inputs[0])


def _statistics(observers: Mapping[str, LayerObserver]) -> dict:
    if not observers:
        raise CalibrationError(
            "Calibrate: no layer of the model ran where it could be observed. "
            "Connect the model before torch.compile, TensorRT and other nodes that replace how it runs."
        )
    return {name: observer.statistics() for name, observer in observers.items()}


def _summary(latent: dict, seed: int, settings: SamplerSettings, runs: int) -> dict[str, object]:
    batch, _, height, width = latent["samples"].shape
    return {**settings.to_json(), "seed": seed, "runs": runs, "latent": [batch, height, width], "torch": torch.__version__}
