"""Records what a pipeline's UNet saw and answered, to ask another UNet the same questions. Judges nothing (see fidelity.py)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .quantize import is_quantized, state_of

SPREAD = 5
_UNET_ARGUMENTS = ("sample", "timestep", "encoder_hidden_states")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sampling:
    """guidance: classifier-free guidance scale; 1 turns it off. seed: of the first prompt, counted up from there."""

    steps: int = 20
    guidance: float = 5.0
    seed: int = 0


@dataclass(frozen=True)
class UNetCall:
    """One call, on the CPU. arguments: as given, nested tensors included. output: (B, 4, h, w)."""

    step: int
    arguments: dict[str, object]
    output: Tensor


@dataclass
class Trajectory:
    """calls: of all batches of prompts, in order. latents: (P, 4, h, w), the end of each prompt's sampling."""

    calls: list[UNetCall] = field(default_factory=list)
    latents: Tensor | None = None


def record_trajectory(
    pipeline, prompts: Sequence[str], sampling: Sampling, batch_size: int = 4, progress: Progress | None = None
) -> Trajectory:
    """Sample every prompt and keep each UNet call's inputs and output.

    Args:
        pipeline: a diffusers SDXL pipeline; its UNet is left as it was.
        batch_size: prompts sampled together.
        progress: called with (UNet calls done, UNet calls in all).
    """
    trajectory = Trajectory()

    def keep(unet: nn.Module, args: tuple, kwargs: dict, output) -> None:
        named = dict(zip(_UNET_ARGUMENTS, args, strict=False)) | {name: value for name, value in kwargs.items() if name != "return_dict"}
        answer = output[0] if isinstance(output, tuple) else output.sample
        step = len(trajectory.calls) % pipeline.num_timesteps
        trajectory.calls.append(UNetCall(step, map_tensors(named, _to_cpu), _to_cpu(answer)))

    handle = pipeline.unet.register_forward_hook(keep, with_kwargs=True)
    try:
        trajectory.latents = sample_latents(pipeline, prompts, sampling, batch_size, progress)
    finally:
        handle.remove()
    return trajectory


def recorded_calls(pipeline, prompts: Sequence[str], sampling: Sampling, batch_size: int, kept: int) -> list[UNetCall]:
    """UNet calls of all timesteps, in random order.

    Args:
        sampling: every batch takes a step more than the one before, up to SPREAD, so that together they visit timesteps all over.
        kept: calls of each batch.
    """
    chosen, choice = [], random.Random(sampling.seed)
    for number, first in enumerate(range(0, len(prompts), batch_size)):
        own = Sampling(sampling.steps + number % SPREAD, sampling.guidance, sampling.seed + first)
        calls = record_trajectory(pipeline, prompts[first : first + batch_size], own, batch_size).calls
        chosen += choice.sample(calls, min(kept, len(calls)))
    choice.shuffle(chosen)
    return chosen


def sample_latents(
    pipeline,
    prompts: Sequence[str],
    sampling: Sampling,
    batch_size: int = 4,
    progress: Progress | None = None,
    stop_after: int | None = None,
) -> Tensor:
    """Final latents of each prompt, (P, 4, h, w) on the CPU; prompt i starts from the noise of seed + i, in any batch.

    Args:
        stop_after: steps after which a batch is left unfinished; None for all.
    """
    firsts = range(0, len(prompts), batch_size)
    latents = []
    for index, first in enumerate(firsts):
        shifted = _shift(progress, index * sampling.steps, len(firsts) * sampling.steps)
        latents.append(_sample_batch(pipeline, prompts[first : first + batch_size], sampling, first, shifted, stop_after))
    return torch.cat(latents)


def decode_latents(pipeline, latents: Tensor, batch_size: int = 4) -> Tensor:
    """Pictures of the latents, (P, 3, H, W) fp32 in [0, 1] on the CPU."""
    vae = pipeline.vae
    if vae.config.get("force_upcast") and vae.dtype is torch.float16:
        vae.to(torch.float32)
    pictures = []
    for part in latents.split(batch_size):
        with torch.inference_mode():
            scaled = part.to(vae.device, vae.dtype) / vae.config.scaling_factor
            pictures.append(vae.decode(scaled, return_dict=False)[0].float().cpu())
    return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)


def replay(unet: nn.Module, trajectory: Trajectory, progress: Progress | None = None) -> Iterator[tuple[UNetCall, Tensor]]:
    """Ask `unet` every recorded question; yields the call and the answer, on the CPU."""
    device = next(unet.parameters()).device
    for done, call in enumerate(trajectory.calls, 1):
        arguments = map_tensors(call.arguments, lambda tensor: tensor.to(device))
        with torch.inference_mode():
            answer = unet(**arguments, return_dict=False)[0]
        yield call, answer.cpu()
        if progress is not None:
            progress(done, len(trajectory.calls))


@contextmanager
def unet_in_place(pipeline, unet: nn.Module) -> Iterator[None]:
    """The pipeline samples with `unet` inside the block, and with its own again after it."""
    original = pipeline.unet
    if is_quantized(unet):
        state_of(unet).tap.follow(pipeline.scheduler)
    pipeline.unet = unet
    try:
        yield
    finally:
        pipeline.unet = original


def _sample_batch(
    pipeline, prompts: Sequence[str], sampling: Sampling, first: int, progress: Progress | None, stop_after: int | None
) -> Tensor:
    # Noise is drawn on the CPU, so that a seed means the same picture on every device.
    generators = [torch.Generator("cpu").manual_seed(sampling.seed + first + index) for index in range(len(prompts))]

    def after_step(pipe, step: int, timestep, tensors: dict) -> dict:
        if progress is not None:
            progress(step + 1, sampling.steps)
        if stop_after is not None and step + 1 >= stop_after:
            pipe._interrupt = True  # diffusers' own way to stop; the pipeline clears it when it is called
        return tensors

    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        prompt=list(prompts),
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        generator=generators,
        output_type="latent",
        callback_on_step_end=after_step,
    )
    return result.images.float().cpu()


def _shift(progress: Progress | None, offset: int, total: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, _: progress(offset + done, total)


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def map_tensors(value, function: Callable[[Tensor], Tensor]):
    """`value` with the function applied to every tensor in it, dicts included."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(part, function) for key, part in value.items()}
    return value
