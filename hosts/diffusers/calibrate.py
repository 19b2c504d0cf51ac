"""Runs a diffusers SDXL pipeline while observers watch every layer's input. The observers live for one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace

from torch import Tensor, nn

from ...errors import CalibrationError
from ...quant.calibration import Calibration, merge
from ...quant.calibration_steps import CalibrationMode, StepChoice
from ...quant.layers import LayerSpec, check_is_sdxl, find_layers
from ...quant.observer import LayerObserver, LayerStatistics
from ...quant.sensitivity import LayerSensitivity
from ..key_mapping import ldm_to_diffusers
from ..progressive import QuantizedPrefix
from ..sensitivity import SensitivityProbe
from ..unfinished import RUNS_DONE, Keeper, runs_done
from .quantize import unet_shapes
from .timestep_tap import TimestepTap
from .trajectory import Progress, Sampling, sample_latents


@dataclass
class _Watch:
    """The observers of one calibration, and which steps of the present run they look at."""

    observers: dict[str, LayerObserver]
    tap: TimestepTap
    steps: StepChoice
    buckets_by_step: list[int] = field(default_factory=list)
    prefix: QuantizedPrefix | None = None

    @property
    def repeating(self) -> bool:
        """Whether the UNet call under way is the quantized prefix's own."""
        return self.prefix is not None and self.prefix.running

    def statistics(self) -> dict[str, LayerStatistics]:
        found = {name: observer.statistics() for name, observer in self.observers.items()}
        return {name: statistics for name, statistics in found.items() if statistics is not None}


def calibrate(
    pipeline,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    batch_size: int = 2,
    progress: Progress | None = None,
    mode: CalibrationMode | str = CalibrationMode.FULL,
    start: Calibration | None = None,
    keep: Callable[[Calibration], None] | None = None,
) -> Calibration:
    """Sample the prompts and record what every quantizable layer of the UNet is given.

    Memory is bounded: per layer 256 rows, and two ranges per input channel and visited bucket.
    Args:
        pipeline: an SDXL pipeline whose UNet is not quantized; left as it was, also after an error or a cancel.
        prompts: kinds of picture the quantized model will be asked for; 8 to 16 are usual.
        progress: called with (UNet calls done, UNet calls in all). Raising in it cancels.
        mode: which steps are looked at, and on what (calibration_steps.py).
        start: an unfinished calibration with the same arguments, to go on from.
        keep: given what was seen, between batches and if one is cancelled; that batch is repeated later.
    Raises: ModelError if the UNet is not SDXL's or quantized already; CalibrationError if there are no prompts, or
        `start` is of other arguments.
    """
    if not prompts:
        raise CalibrationError("Calibrate: no prompts; at least one is needed. Usual is 8 to 16.")
    sampling, mode = sampling or Sampling(), CalibrationMode(mode)
    shapes = unet_shapes(pipeline.unet)
    check_is_sdxl(shapes, "UNet")
    summary = _summary(pipeline, prompts, sampling, mode)
    batches = [list(prompts[first : first + batch_size]) for first in range(0, len(prompts), batch_size)]
    done = runs_done(start, summary, len(batches))
    keeper = Keeper(keep, done)
    with _observed(pipeline, find_layers(shapes), mode) as watch:

        def calibration() -> Calibration:
            new = Calibration(watch.statistics(), {})
            whole = new if start is None else merge(start, new)
            return Calibration(whole.layers, summary | ({RUNS_DONE: done} if done < len(batches) else {}), whole.sensitivity)

        try:
            while done < len(batches):
                shifted = _shifted(progress, done * sampling.steps, len(batches) * sampling.steps)
                _run_batch(pipeline, batches[done], replace(sampling, seed=sampling.seed + done * batch_size), watch, shifted)
                done += 1
                if done < len(batches):
                    keeper.run_ended(done, calibration)
        except BaseException:
            keeper.interrupted(done, calibration)
            raise
        return calibration()


def measure_sensitivity(
    pipeline, prompt: str, sampling: Sampling | None = None, probes: int = 3, progress: Progress | None = None
) -> dict[str, LayerSensitivity]:
    """How much of each layer's noise reaches the UNet's output, at so many places of the schedule.

    Samples one picture without guidance, and repeats `probes` of its UNet calls once per layer.
    """
    unet = pipeline.unet
    layers = find_layers(unet_shapes(unet))
    modules = {name: unet.get_submodule(ldm_to_diffusers(name)) for name in layers}
    tap = TimestepTap(unet)
    tap.follow(pipeline.scheduler)
    probe = SensitivityProbe(unet, modules, lambda: tap.buckets, probes)
    probe.on_tick = progress
    try:
        with probe.attached():
            sample_latents(pipeline, [prompt], replace(sampling or Sampling(), guidance=1.0), 1)
    finally:
        tap.remove()
    return probe.sensitivity()


def _run_batch(pipeline, prompts: list[str], sampling: Sampling, watch: _Watch, progress: Progress | None) -> None:
    stop_after = watch.steps.begin_run({} if watch.steps.whole_runs else watch.statistics())
    watch.buckets_by_step.clear()
    sample_latents(pipeline, prompts, sampling, len(prompts), progress, stop_after)
    watch.steps.end_run(list(watch.buckets_by_step))
    if progress is not None:
        progress(sampling.steps, sampling.steps)


@contextmanager
def _observed(pipeline, layers: dict[str, LayerSpec], mode: CalibrationMode) -> Iterator[_Watch]:
    unet = pipeline.unet
    device = next(unet.parameters()).device
    tap = TimestepTap(unet)
    tap.follow(pipeline.scheduler)
    watch = _Watch({name: LayerObserver(spec.in_channels, device) for name, spec in layers.items()}, tap, StepChoice(mode))
    modules = {name: unet.get_submodule(ldm_to_diffusers(name)) for name in watch.observers}
    if mode is CalibrationMode.PROGRESSIVE:
        watch.prefix = QuantizedPrefix(unet, modules, watch.observers, lambda: tap.buckets)
    handles = [unet.register_forward_pre_hook(lambda _unet, _args: _note_step(watch))]
    try:
        for name, observer in watch.observers.items():
            handles.append(modules[name].register_forward_pre_hook(_observing_hook(observer, watch)))
        with nullcontext() if watch.prefix is None else watch.prefix.attached():
            yield watch
    finally:
        for handle in handles:
            handle.remove()
        tap.remove()


def _note_step(watch: _Watch) -> None:
    if not watch.repeating:
        watch.buckets_by_step.append(watch.tap.buckets[0])


def _observing_hook(observer: LayerObserver, watch: _Watch):
    def before_layer(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        buckets = watch.tap.buckets
        if watch.repeating or not watch.steps.observes(buckets[0]):
            return
        x = args[0]
        rows = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x.reshape(x.shape[0], -1, x.shape[-1])  # (B, rows, C)
        observer.update(rows, buckets)

    return before_layer


def _shifted(progress: Progress | None, offset: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _total: progress(offset + done, total)


def _summary(pipeline, prompts: Sequence[str], sampling: Sampling, mode: CalibrationMode) -> dict[str, object]:
    return {
        "engine": "diffusers",
        "prompts": list(prompts),
        "scheduler": type(pipeline.scheduler).__name__,
        "mode": mode.value,
        **asdict(sampling),
    }
