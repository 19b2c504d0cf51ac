"""Measures one quantized UNet against the recorded reference: SQNR per step, latents, pictures, adherence. Chooses and prints nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from quality_judge import Difference, Judge, paired_difference
from torch import Tensor, nn

from stepquant.hosts.diffusers.fidelity import Reference, psnr_db, step_sqnr
from stepquant.hosts.diffusers.timestep_tap import TimestepTap
from stepquant.hosts.diffusers.trajectory import Sampling, decode_latents, sample_latents
from stepquant.hosts.key_mapping import ldm_to_diffusers
from stepquant.quant.mac_counter import MacCounter
from stepquant.quant.sqnr import StepSqnr, sqnr_db

PICTURES_PER_DECODE = 64


@dataclass
class Candidate:
    """A quantized UNet. layers: LDM names of all quantizable layers, quantized or not. simulated: how many run in floats."""

    unet: nn.Module
    tap: TimestepTap
    layers: Sequence[str]
    simulated: int


@dataclass(frozen=True)
class Closeness:
    """All in dB but integer_share and macs, which is by layer. psnr_db: of the mean squared error over all pictures; None where nothing was
    sampled."""

    steps: StepSqnr
    integer_share: float
    macs: Mapping[str, int]
    latent_sqnr_db: float | None = None
    psnr_db: float | None = None
    pictures: Tensor | None = None


@contextmanager
def in_place(pipeline, candidate: Candidate) -> Iterator[None]:
    """The pipeline samples with the candidate inside the block."""
    original = pipeline.unet
    candidate.tap.follow(pipeline.scheduler)
    pipeline.unet = candidate.unet
    try:
        yield
    finally:
        pipeline.unet = original


def measure_closeness(pipeline, candidate: Candidate, reference: Reference, sample: bool) -> Closeness:
    """SQNR on the reference's own trajectory; with `sample` also latents and pictures of the same seeds."""
    counter = MacCounter()
    candidate.tap.follow(pipeline.scheduler)
    with counted(candidate, counter):
        steps = step_sqnr(candidate.unet, reference.trajectory)
    if not sample:
        return Closeness(steps, counter.integer_share(), counter.total_by_layer)
    with in_place(pipeline, candidate):
        latents = sample_latents(pipeline, reference.prompts, reference.sampling, reference.batch_size)
    pictures = decode_latents(pipeline, latents, PICTURES_PER_DECODE)
    error = [10 ** (-value / 10) for value in psnr_db(reference.pictures, pictures)]
    mean = sum(error) / len(error)
    peak = -10 * math.log10(mean) if mean else math.inf
    return Closeness(steps, counter.integer_share(), counter.total_by_layer, sqnr_db(reference.trajectory.latents, latents), peak, pictures)


@contextmanager
def counted(candidate: Candidate, counter: MacCounter) -> Iterator[None]:
    """Every quantizable layer reports its multiply-adds, those that stayed 16 bit too."""
    handles = []

    def of_float_layer(name: str):
        def after(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            counter.record(name, output.numel() * layer.weight[0].numel(), integer=False)

        return after

    modules = {name: candidate.unet.get_submodule(ldm_to_diffusers(name)) for name in candidate.layers}
    for name, module in modules.items():
        if hasattr(module, "counter"):
            module.counter = counter
        else:
            handles.append(module.register_forward_hook(of_float_layer(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in modules.values():
            if hasattr(module, "counter"):
                module.counter = None


@dataclass(frozen=True)
class Adherence:
    """Shares in percent that the judge found right, and paired differences to fp16: of all prompts, seen and held-out ones."""

    share: float
    all: Difference
    seen: Difference
    heldout: Difference


def judged(pipeline, judge: Judge, prompts: Sequence[str], sampling: Sampling, batch: int, progress: Callable[[int, int], None]) -> Tensor:
    """(P,) bool: which pictures adhere; picture i is of seed + i, whatever UNet the pipeline holds."""
    right = []
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        latents = sample_latents(pipeline, part, Sampling(sampling.steps, sampling.guidance, sampling.seed + first), len(part))
        right.append(judge.adheres(decode_latents(pipeline, latents, PICTURES_PER_DECODE), part))
        progress(first + len(part), len(prompts))
    return torch.cat(right)


def adherence(reference: Tensor, test: Tensor, seen: Tensor) -> Adherence:
    """seen: (P,) bool, which prompts are of trained combinations."""
    differences = [paired_difference(reference[part], test[part]) for part in (torch.ones_like(seen), seen, ~seen)]
    return Adherence(100 * float(test.double().mean()), *differences)
