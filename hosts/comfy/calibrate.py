"""Calibrates a loaded SDXL: runs it with ComfyUI's sampler while observers watch every layer's input.

The observers live for one call: they are forward hooks on the running model's layers, removed in `finally`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...errors import CalibrationError, ModelError
from ...quant.calibration import Calibration, merge
from ...quant.calibration_steps import CalibrationMode, StepChoice
from ...quant.layers import LayerSpec, check_is_sdxl, find_layers
from ...quant.observer import LayerObserver, LayerStatistics
from ..progressive import QuantizedPrefix
from ..sensitivity import SensitivityProbe
from ..unfinished import RUNS_DONE, Keeper, runs_done
from .attach import state_of
from .sampling import SEEDS, SamplerSettings, SamplingProgress, sample_latent
from .tap import TimestepTap

PROBES = 3  # places of the schedule where sensitivity is measured; it changes smoothly along it


def calibrate(
    model: ModelPatcher,
    positive: list,
    negative: list,
    latent: dict,
    seed: int,
    settings: SamplerSettings,
    runs: int = 1,
    mode: CalibrationMode | str = CalibrationMode.FULL,
    probes: int = 0,
    start: Calibration | None = None,
    keep: Callable[[Calibration], None] | None = None,
) -> Calibration:
    """Record what every quantizable layer of `model` is given while it makes `runs` pictures.

    Args:
        model: an SDXL that is not quantized, with whatever LoRAs and patches it carries; left as it was.
        latent: ComfyUI latent dictionary, as KSampler takes it: empty, a picture's, or with a noise mask.
        seed: of the first run; the others count up from it.
        runs: sampling runs. Memory does not grow with it: 256 rows and 64 ranges a layer are kept at most.
        mode: which steps are looked at, and on what (quant/calibration_steps.py).
        probes: places of the schedule where the first run measures each layer's sensitivity; 0 for none. Each takes as many
            UNet calls as there are layers, or kinds of layers in a deep UNet.
        start: an unfinished calibration with the same arguments, to go on from.
        keep: given what was seen, between runs and if one is cancelled; that run is repeated later.
    Raises: ModelError if the model is no SDXL or quantized already; CalibrationError if its layers could not be observed, or
        `start` is of other arguments.
    """
    if state_of(model) is not None:
        raise ModelError("Calibrate: the model is quantized already. Connect the 16-bit model that it was made from.")
    unet = model.model.diffusion_model
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    check_is_sdxl(shapes, "Calibrate: the model")
    layers = find_layers(shapes)
    summary = _summary(latent, seed, settings, runs, CalibrationMode(mode), probes)
    done = runs_done(start, summary, runs)
    watch = _Watch(model, StepChoice(mode))
    if CalibrationMode(mode) is CalibrationMode.PROGRESSIVE:
        watch.prefix = _prefix(unet, layers, watch)
    with _hooks(unet, layers, watch):

        def calibration() -> Calibration:
            new = Calibration(_statistics(watch), {}, watch.sensitivity)
            whole = new if start is None else merge(start, new)
            return Calibration(whole.layers, summary | ({RUNS_DONE: done} if done < runs else {}), whole.sensitivity)

        keeper, progress = Keeper(keep, done), None
        try:
            while done < runs:
                probe = _probe(unet, layers, watch, probes if done == 0 else 0)
                progress = progress or SamplingProgress(runs - done, settings.steps, probe.repetitions)
                _run(model, positive, negative, latent, (seed + done) % SEEDS, settings, watch, probe, progress)
                done += 1
                if done < runs:
                    keeper.run_ended(done, calibration)
        except BaseException:
            keeper.interrupted(done, calibration)
            raise
        return calibration()


def _run(
    model: ModelPatcher,
    positive: list,
    negative: list,
    latent: dict,
    seed: int,
    settings: SamplerSettings,
    watch: _Watch,
    probe: SensitivityProbe,
    progress: SamplingProgress,
) -> None:
    stop_after = watch.steps.begin_run({} if watch.steps.whole_runs else _found(watch))
    watch.probe, buckets_by_step = probe, []
    draw = progress.callback(model)

    def after_step(step: int, denoised: Tensor, noisy: Tensor, total: int) -> None:
        buckets_by_step.append(watch.first_bucket)
        watch.first_bucket = None
        draw(step, denoised, noisy, total)

    probe.on_tick = progress.tick
    # The prefix last: a probe's hook then comes first, on the float model's answer.
    with probe.attached(), nullcontext() if watch.prefix is None else watch.prefix.attached():
        sample_latent(model, positive, negative, latent, seed, settings, after_step, stop_after)
    watch.sensitivity |= probe.sensitivity()
    watch.steps.end_run([bucket for bucket in buckets_by_step if bucket is not None])


class _Watch:
    """The observers of one calibration, and the timestep bucket of each sample in the UNet call that is under way."""

    def __init__(self, model: ModelPatcher, steps: StepChoice) -> None:
        self.observers: dict[str, LayerObserver] = {}
        self.sensitivity: dict = {}
        self.steps = steps
        self.probe: SensitivityProbe | None = None
        self.prefix: QuantizedPrefix | None = None
        self.first_bucket: int | None = None  # of the present step: some samplers call the UNet more than once in it
        # The same tap that quantized models read, so that calibration and use agree at the edges of buckets.
        self._tap = TimestepTap()
        self._tap.follow(model.get_model_object("model_sampling"))
        self.buckets = [0]

    def note_timesteps(self, embedding: Tensor) -> None:
        self._tap.observe(embedding)
        self.buckets = self._tap.bucket.tolist()
        if self.first_bucket is None:
            self.first_bucket = self.buckets[0]

    @property
    def repeating(self) -> bool:
        """Whether the UNet call under way is a probe's or the quantized prefix's own."""
        return (self.probe is not None and self.probe.running) or (self.prefix is not None and self.prefix.running)

    def observe(self, layer: LayerSpec, x: Tensor) -> None:
        if self.repeating or not self.steps.observes(self.buckets[0]):
            return
        rows = x.flatten(2).transpose(1, 2) if layer.is_conv else x.reshape(x.shape[0], -1, x.shape[-1])  # (B, rows, C)
        if layer.name not in self.observers:
            self.observers[layer.name] = LayerObserver(layer.in_channels, rows.device)
        self.observers[layer.name].update(rows, _spread(self.buckets, rows.shape[0]))


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


def _probe(unet: nn.Module, layers: Mapping[str, LayerSpec], watch: _Watch, probes: int) -> SensitivityProbe:
    modules = {name: module for name, module in unet.named_modules() if name in layers}
    return SensitivityProbe(unet, modules, lambda: watch.buckets, probes)


def _prefix(unet: nn.Module, layers: Mapping[str, LayerSpec], watch: _Watch) -> QuantizedPrefix:
    modules = {name: module for name, module in unet.named_modules() if name in layers}
    probing = lambda: watch.probe is not None and watch.probe.running  # noqa: E731
    return QuantizedPrefix(unet, modules, watch.observers, lambda: watch.buckets, probing)


def _found(watch: _Watch) -> dict[str, LayerStatistics]:
    return {name: observer.statistics() for name, observer in watch.observers.items()}


def _statistics(watch: _Watch) -> dict[str, LayerStatistics]:
    if not watch.observers:
        raise CalibrationError(
            "Calibrate: no layer of the model ran where it could be observed. "
            "Connect the model before torch.compile, TensorRT and other nodes that replace how it runs."
        )
    return _found(watch)


def _summary(latent: dict, seed: int, settings: SamplerSettings, runs: int, mode: CalibrationMode, probes: int) -> dict[str, object]:
    batch, _, height, width = latent["samples"].shape
    picture = {"latent": [batch, height, width], "masked": latent.get("noise_mask") is not None}
    return {
        **settings.to_json(),
        "seed": seed,
        "runs": runs,
        "mode": mode.value,
        "probes": probes,
        **picture,
        "torch": torch.__version__,
    }
