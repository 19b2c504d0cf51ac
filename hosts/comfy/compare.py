"""Compares a quantized model with its original on the same seeds: pictures, SQNR, PSNR, time. Draws nothing.

The SQNR per step is that of the UNet's output on the original's own trajectory: the original samples once and every
UNet output is kept; the quantized model then samples too, but each of its outputs is measured and replaced by the
original's. So it is given what the original was given at every step, ControlNets and hooks included, and both
models need not be in GPU memory together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.sd import VAE
from torch import Tensor

from ...errors import ModelError
from ...quant.sqnr import StepSqnr, sqnr_db
from .attach import counting_macs
from .sampling import SEEDS, SamplerSettings, SamplingProgress, sample_latent
from .saturation import said_of_runs

WRAPPER_KEY = "stepquant_compare"
STEPS_TO_WARM_UP = 2


@dataclass
class Comparison:
    """original, quantized: (R, H, W, 3) in [0, 1], one per picture. seeds, psnr_db: one per picture.

    step_sqnr: UNet output per step; energies summed over runs. integer_share: in [0, 1] of the multiply-adds
    outside the never-quantized layers; None if the model counted none. float_layers: those of them that did not all
    run as integers. saturation: of each run in which static layers left their range, what is said of it; None if it has none.
    """

    original: Tensor
    quantized: Tensor
    seeds: list[int]
    psnr_db: list[float]
    step_sqnr: StepSqnr
    latent_sqnr_db: float
    original_ms_per_step: float
    quantized_ms_per_step: float
    integer_share: float | None
    float_layers: list[str]
    saturation: list[str] | None

    def lines(self) -> list[str]:
        """The figures as text, one line each, ASCII."""
        speed = self.original_ms_per_step / max(self.quantized_ms_per_step, 1e-9)
        share = "not counted" if self.integer_share is None else f"{100 * self.integer_share:.1f} %"
        return [
            f"UNet output SQNR: mean {_decibels(self.step_sqnr.mean_db())}, worst step {_decibels(self.step_sqnr.worst_db())}",
            f"Final latent SQNR: {_decibels(self.latent_sqnr_db)}",
            f"Picture PSNR: mean {_decibels(sum(self.psnr_db) / len(self.psnr_db))}, worst {_decibels(min(self.psnr_db))}",
            f"Time per step: original {self.original_ms_per_step:.1f} ms, quantized {self.quantized_ms_per_step:.1f} ms ({speed:.2f}x)",
            f"Multiply-adds that ran as integers: {share}",
            *self._saturation_lines(),
        ]

    def _saturation_lines(self) -> list[str]:
        if self.saturation is None:
            return []
        return [f"Saturation: {said}" for said in self.saturation] or ["Saturation: no static layer left its calibrated range"]


@dataclass
class _Call:
    """One UNet call, for one of its conditionings: step, which conditioning (ComfyUI's cond_or_uncond), output."""

    step: int
    conditioning: int
    output: Tensor


@dataclass
class _Samples:
    """latents of all runs, (R, 4, h, w) on the CPU, and the time of a sampling step."""

    latents: Tensor
    ms_per_step: float


def compare_models(
    original: ModelPatcher,
    quantized: ModelPatcher,
    vae: VAE,
    positive: list,
    negative: list,
    latent: dict,
    seed: int,
    settings: SamplerSettings,
    runs: int = 1,
) -> Comparison:
    """Make the same pictures with both models and measure how far they are apart.

    Args:
        seed: of the first run; the others count up from it.
        runs: sampling runs, three samplings each. A latent batch makes that many pictures a run.
    Raises: ModelError if the two models are not called alike, so that no step can be compared.
    """
    seeds = [(seed + run) % SEEDS for run in range(runs)]
    progress = SamplingProgress(3 * runs, settings.steps)

    def sample_all(model: ModelPatcher) -> _Samples:
        return _sample_all(model, positive, negative, latent, seeds, settings, progress)

    recorder = _Recorder()
    first = sample_all(_wrapped(original, recorder.record))
    with said_of_runs(quantized.model) as saturation:
        second = sample_all(quantized)
    replay = _Replay(recorder.calls)
    with counting_macs(quantized.model) as counter:
        sample_all(_wrapped(quantized, replay.compare))
    pictures, quantized_pictures = _decode(vae, first.latents), _decode(vae, second.latents)
    return Comparison(
        pictures,
        quantized_pictures,
        [one for one in seeds for _ in range(len(pictures) // runs)],
        [psnr_db(one, other) for one, other in zip(pictures, quantized_pictures, strict=True)],
        replay.step_sqnr,
        sqnr_db(first.latents, second.latents),
        first.ms_per_step,
        second.ms_per_step,
        counter.integer_share() if counter.total else None,
        sorted(name for name, macs in counter.total_by_layer.items() if counter.integer_by_layer.get(name, 0) < macs),
        saturation,
    )


def psnr_db(reference: Tensor, test: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures in [0, 1], in dB; inf if equal."""
    error = torch.mean((reference.double() - test.double()) ** 2).item()
    return math.inf if error == 0 else -10 * math.log10(error)


class _Recorder:
    """Keeps every UNet output of a sampling run, on the CPU: 4 channels a picture, so a megabyte or two a step at most."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def record(self, executor: Callable, x: Tensor, timesteps: Tensor, *args: object, **kwargs: object) -> Tensor:
        output = executor(x, timesteps, *args, **kwargs)
        options = _transformer_options(args, kwargs)
        for conditioning, part in zip(options["cond_or_uncond"], _parts(output, options), strict=True):
            self.calls.append(_Call(_step(options), conditioning, part.to("cpu", copy=True)))
        return output


class _Replay:
    """Measures the quantized model's outputs against the recorded ones, and hands the recorded ones to the sampler."""

    def __init__(self, calls: Sequence[_Call]) -> None:
        self.step_sqnr = StepSqnr()
        self._calls = iter(calls)

    def compare(self, executor: Callable, x: Tensor, timesteps: Tensor, *args: object, **kwargs: object) -> Tensor:
        output = executor(x, timesteps, *args, **kwargs)
        options = _transformer_options(args, kwargs)
        recorded = []
        # ComfyUI takes conditionings in a fixed order, whether free memory lets it batch them or not.
        for conditioning, part in zip(options["cond_or_uncond"], _parts(output, options), strict=True):
            call = next(self._calls, None)
            if call is None or call.conditioning != conditioning or call.output.shape != part.shape:
                raise ModelError(
                    "Compare: the two models were called differently, so their steps cannot be compared. "
                    "Give both the same LoRAs, patches and sampling nodes."
                )
            reference = call.output.to(part.device)
            self.step_sqnr.add(call.step, reference, part)
            recorded.append(reference)
        return torch.cat(recorded).to(output.dtype)


def _transformer_options(args: tuple, kwargs: dict) -> dict:
    # DIFFUSION_MODEL wrappers get (x, timesteps, context, y, control, transformer_options).
    return kwargs["transformer_options"] if "transformer_options" in kwargs else args[3]


def _parts(output: Tensor, options: dict) -> tuple[Tensor, ...]:
    return output.chunk(len(options["cond_or_uncond"]))


def _step(options: dict) -> int:
    """Index of the sampler step a call belongs to; a second call within a step counts to that step."""
    schedule, sigma = options["sample_sigmas"], options["sigmas"].max()
    return max(0, int((schedule >= sigma.to(schedule) * (1 - 1e-5)).sum()) - 1)


def _wrapped(model: ModelPatcher, wrapper: Callable) -> ModelPatcher:
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, WRAPPER_KEY, wrapper)
    return clone


def _sample_all(
    model: ModelPatcher,
    positive: list,
    negative: list,
    latent: dict,
    seeds: Sequence[int],
    settings: SamplerSettings,
    progress: SamplingProgress,
) -> _Samples:
    latents, seconds, steps = [], 0.0, 0
    for seed in seeds:
        clock = _StepClock(progress.callback(model))
        latents.append(sample_latent(model, positive, negative, latent, seed, settings, clock.after_step).cpu())
        seconds += clock.seconds()
        steps += clock.steps()
    return _Samples(torch.cat(latents), 1000 * seconds / steps if steps else math.nan)


class _StepClock:
    """Times the steps after the first two, which pay for loading, warming up and recording a CUDA graph; the last one in a shorter run."""

    def __init__(self, callback: Callable) -> None:
        self._callback = callback
        self._start = time.perf_counter()
        self._times: list[float] = []

    def after_step(self, step: int, denoised: Tensor, noisy: Tensor, total: int) -> None:
        if denoised.is_cuda:
            torch.cuda.synchronize(denoised.device)
        self._times.append(time.perf_counter())
        self._callback(step, denoised, noisy, total)

    def seconds(self) -> float:
        return self._times[-1] - [self._start, *self._times][self._left_out()] if self._times else 0.0

    def steps(self) -> int:
        return len(self._times) - self._left_out()

    def _left_out(self) -> int:
        return max(0, min(STEPS_TO_WARM_UP, len(self._times) - 1))


def _decode(vae: VAE, latents: Tensor) -> Tensor:
    return torch.cat([vae.decode(one[None]) for one in latents]).clamp(0, 1).cpu().float()


def _decibels(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else ("equal" if value > 0 else "broken")
