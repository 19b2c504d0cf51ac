"""ComfyUI's own sampler, called as its KSampler node calls it. Used for calibration and comparison; draws no pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import comfy.sample
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher

from .progress_text import TimeLeft

StepCallback = Callable[[int, torch.Tensor, torch.Tensor, int], None]
SEEDS = 2**64  # ComfyUI's seed widgets and torch's generator take 64 bits; counting up wraps around


@dataclass(frozen=True)
class SamplerSettings:
    """The widgets of a KSampler, without the seed."""

    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float = 1.0

    def to_json(self) -> dict[str, object]:
        return asdict(self)


class SamplingProgress:
    """One progress bar with preview over several sampling runs, and below it the time left."""

    def __init__(self, runs: int, steps: int, extra: int = 0) -> None:
        """extra: UNet calls besides the steps, reported by `tick`."""
        self._total = runs * steps + extra
        self._bar = comfy.utils.ProgressBar(self._total)
        self._steps = steps
        self._finished_runs = 0
        self._ticks = 0
        self._time_left = TimeLeft(self._total)

    def tick(self, done: int, _total: int) -> None:
        """One of the extra calls is done."""
        self._ticks = done
        self._show((self._finished_runs - 1) * self._steps)

    def _show(self, steps_done: int, preview: object = None) -> None:
        done = steps_done + self._ticks
        self._bar.update_absolute(done, preview=preview)
        self._time_left.show(done)

    def callback(self, model: ModelPatcher) -> StepCallback:
        """For the next run. ComfyUI calls it after each step; an interrupt is noticed there and in every layer."""
        previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        done_before = self._finished_runs * self._steps
        self._finished_runs += 1

        def after_step(step: int, denoised: torch.Tensor, _noisy: torch.Tensor, _total: int) -> None:
            preview = previewer.decode_latent_to_preview_image("JPEG", denoised) if previewer else None
            self._show(done_before + step + 1, preview)

        return after_step


def sample_latent(
    model: ModelPatcher,
    positive: list,
    negative: list,
    latent: dict,
    seed: int,
    settings: SamplerSettings,
    callback: StepCallback | None = None,
    stop_after: int | None = None,
) -> torch.Tensor:
    """Sample as KSampler would with the same inputs.

    Args:
        positive, negative: ComfyUI conditionings. latent: ComfyUI latent dictionary; left unchanged.
        stop_after: leave off after so many steps; None for all.
    Returns: (B, 4, h, w) latents.
    """
    start = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    )
    noise = comfy.sample.prepare_noise(start, seed, latent.get("batch_index"))
    return comfy.sample.sample(
        model,
        noise,
        settings.steps,
        settings.cfg,
        settings.sampler_name,
        settings.scheduler,
        positive,
        negative,
        start,
        denoise=settings.denoise,
        last_step=stop_after,
        noise_mask=latent.get("noise_mask"),
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
