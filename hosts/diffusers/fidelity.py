"""How close another UNet stays to the one whose trajectory was recorded: SQNR of its answers, of the latents, PSNR of pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ...quant.mac_counter import MacCounter
from ...quant.sqnr import StepSqnr, sqnr_db
from .quantize import attach_counter
from .trajectory import Progress, Sampling, Trajectory, decode_latents, record_trajectory, replay, sample_latents, unet_in_place


@dataclass(frozen=True)
class Reference:
    """What the unquantized model makes of the prompts. pictures: (P, 3, H, W) fp32 in [0, 1]. seconds: sampling, per picture."""

    prompts: tuple[str, ...]
    sampling: Sampling
    batch_size: int
    trajectory: Trajectory
    pictures: Tensor
    seconds: float


@dataclass(frozen=True)
class Fidelity:
    """All in dB. step_sqnr_db: the UNet's output on the reference's own trajectory, energies summed over prompts.

    latent_sqnr_db: the final latents of its own sampling, energies summed over prompts. psnr_db: one per picture.
    pictures: (P, 3, H, W) fp32 in [0, 1]. seconds: sampling, per picture. integer_share: of the quantizable layers'
    multiply-adds, in [0, 1].
    """

    step_sqnr_db: tuple[float, ...]
    latent_sqnr_db: float
    psnr_db: tuple[float, ...]
    pictures: Tensor
    seconds: float
    integer_share: float

    @property
    def sqnr_db(self) -> float:
        return sum(self.step_sqnr_db) / len(self.step_sqnr_db)

    @property
    def sqnr_worst_db(self) -> float:
        return min(self.step_sqnr_db)

    @property
    def mean_psnr_db(self) -> float:
        """PSNR of the mean squared error over all pictures: one exact picture cannot make it infinite."""
        error = sum(10 ** (-value / 10) for value in self.psnr_db) / len(self.psnr_db)
        return -10 * math.log10(error) if error else math.inf


def record_reference(
    pipeline, prompts: Sequence[str], sampling: Sampling, batch_size: int = 4, progress: Progress | None = None
) -> Reference:
    """Sample the prompts with the pipeline as it is, and keep what is needed to judge another UNet."""
    start = time.perf_counter()
    trajectory = record_trajectory(pipeline, prompts, sampling, batch_size, progress)
    seconds = (time.perf_counter() - start) / len(prompts)
    pictures = decode_latents(pipeline, trajectory.latents)
    return Reference(tuple(prompts), sampling, batch_size, trajectory, pictures, seconds)


def measure_fidelity(
    pipeline, unet: nn.Module, reference: Reference, replay_progress: Progress | None = None, sample_progress: Progress | None = None
) -> Fidelity:
    """Judge `unet` by the reference's questions and by its own sampling from the same seeds. The pipeline keeps its UNet."""
    counter = MacCounter()
    attach_counter(unet, counter)
    try:
        with unet_in_place(pipeline, unet):
            steps = step_sqnr(unet, reference.trajectory, replay_progress)
            start = time.perf_counter()
            latents = sample_latents(pipeline, reference.prompts, reference.sampling, reference.batch_size, sample_progress)
        seconds = (time.perf_counter() - start) / len(reference.prompts)
    finally:
        attach_counter(unet, None)
    pictures = decode_latents(pipeline, latents)
    return Fidelity(
        step_sqnr_db=tuple(steps.per_step_db()),
        latent_sqnr_db=sqnr_db(reference.trajectory.latents, latents),
        psnr_db=psnr_db(reference.pictures, pictures),
        pictures=pictures,
        seconds=seconds,
        integer_share=counter.integer_share(),
    )


def step_sqnr(unet: nn.Module, trajectory: Trajectory, progress: Progress | None = None) -> StepSqnr:
    """SQNR of the UNet's answers to the recorded questions."""
    meter = StepSqnr()
    for call, answer in replay(unet, trajectory, progress):
        meter.add(call.step, call.output, answer)
    return meter


def psnr_db(reference: Tensor, test: Tensor) -> tuple[float, ...]:
    """PSNR of each picture; (P, 3, H, W) in [0, 1], rounded to 8 bits as a PNG holds them. inf if equal."""
    error = (_to_8_bit(reference) - _to_8_bit(test)).square().flatten(1).mean(1)  # (P,)
    return tuple(math.inf if value == 0 else -10 * math.log10(value) for value in error.tolist())


def _to_8_bit(pictures: Tensor) -> Tensor:
    return (pictures.double().clamp(0, 1) * 255).round() / 255
