"""Other samplers, step counts, a resolution and prompts than were calibrated on: how much SQNR a static recipe loses there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from quality_measure import Candidate

from stepquant.hosts.diffusers.fidelity import step_sqnr
from stepquant.hosts.diffusers.trajectory import Sampling, record_trajectory
from stepquant.quant.sqnr import StepSqnr


@dataclass(frozen=True)
class Setting:
    """scheduler: None for the calibrated one; options: of it. side: of the latent; the demo model's own is 32."""

    name: str
    steps: int = 20
    scheduler: type | None = None
    side: int = 32
    heldout: bool = False
    options: Mapping[str, object] = field(default_factory=dict)


# diffusers' own default clips the prediction to [-1, 1]: of latents, whose spread then falls to half, and with it the pictures.
DDIM_OF_LATENTS = {"clip_sample": False, "set_alpha_to_one": False}
# The first is what was calibrated on, but for the prompts.
SETTINGS = (
    Setting("euler 20"),
    Setting("euler 10", steps=10),
    Setting("euler 35", steps=35),
    Setting("dpm++ 2m 20", scheduler=DPMSolverMultistepScheduler),
    Setting("ddim 20", scheduler=DDIMScheduler, options=DDIM_OF_LATENTS),
    Setting("euler ancestral 20", scheduler=EulerAncestralDiscreteScheduler),
    Setting("320 px", side=40),
    Setting("held-out prompts", heldout=True),
)


@contextmanager
def applied(pipeline, setting: Setting) -> Iterator[None]:
    """The pipeline samples as the setting says inside the block."""
    scheduler, side = pipeline.scheduler, pipeline.default_sample_size
    if setting.scheduler is not None:
        pipeline.scheduler = setting.scheduler.from_config(scheduler.config, **setting.options)
    pipeline.default_sample_size = setting.side
    try:
        yield
    finally:
        pipeline.scheduler, pipeline.default_sample_size = scheduler, side


def setting_sqnr(
    pipeline, setting: Setting, candidates: Sequence[Candidate], prompts: Sequence[str], guidance: float, seed: int, batch: int
) -> list[StepSqnr]:
    """SQNR of every candidate on the pipeline's own trajectory in one setting."""
    with applied(pipeline, setting):
        trajectory = record_trajectory(pipeline, prompts, Sampling(setting.steps, guidance, seed), batch)
        meters = []
        for candidate in candidates:
            candidate.tap.follow(pipeline.scheduler)
            meters.append(step_sqnr(candidate.unet, trajectory))
    return meters
