"""Tells the quantized layers which timestep bucket each sample of the running UNet call is in. Holds no scales.

Read inside the UNet, from the input of `time_embed.0`: that is always executed, per sample, on the right device, and
survives batching, torch.compile, multi-GPU clones and nodes that call the model themselves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...quant.timestep import NUM_TIMESTEPS, sigma_to_timestep, timestep_bucket
from . import compiled
from .scale_bank import ScaleBank

# ComfyUI's (and LDM's) timestep embedding: cos and sin of t * 10000^(-k / half), k = 0 ... half - 1.
MAX_PERIOD = 10_000
# Below pi, so that the angle of the largest timestep is still unambiguous.
LARGEST_ANGLE = 0.95 * math.pi
# Samplings that count in noise levels (EDM: 0.25 ln sigma) span a few units, timesteps span a thousand.
CONTINUOUS_SPAN = 100
CONTINUOUS_POINTS = 1024
# Keeps t = 125, which lies on the edge of two buckets, from falling into the lower one by rounding.
EDGE = 0.01


class TimestepTap:
    """One per model. `bucket`: (B,) int64 on the UNet's device, for each B always the same tensor, updated in place.

    Before the first call it is one zero, so that a layer called alone still has a bucket. `version` rises whenever the
    way from timestep to bucket changes.
    """

    def __init__(self) -> None:
        self.bucket = _plain_zeros((1,), torch.device("cpu"))
        self.version = 0
        self.scales: ScaleBank | None = None  # set by scale_lora.py
        self._number = compiled.number(self)
        self._buckets: dict[tuple, Tensor] = {}
        self._followed: tuple[nn.Module, Tensor] | None = None
        self._table = torch.zeros(1, dtype=torch.int64)
        self._first, self._points_per_unit = 0.0, 0.0

    def __setstate__(self, state: dict) -> None:
        """A copy is being made."""
        vars(self).update(state)
        self._number = compiled.number(self)

    def follow(self, model_sampling: nn.Module) -> None:
        """Read how this sampling maps noise levels to what the UNet is given; again only if it has changed.

        Right for eps, v-prediction with zero terminal SNR, LCM, EDM and other continuous samplings: t to sigma by the
        sampling itself, sigma to SDXL's base schedule, tabulated over the sampling's own range.
        """
        # By value: ComfyUI makes the buffer anew whenever it moves the model, and some nodes change it in place.
        sigmas = torch.as_tensor(model_sampling.sigmas).to("cpu", copy=True)
        if self._followed is not None and self._followed[0] is model_sampling and torch.equal(self._followed[1], sigmas):
            return
        with torch.inference_mode(False), torch.no_grad():
            ends = torch.tensor([float(model_sampling.sigma_min), float(model_sampling.sigma_max)])
            first, last = (float(t) for t in model_sampling.timestep(ends).float())
            points = CONTINUOUS_POINTS if last - first < CONTINUOUS_SPAN else round(last - first) + 1
            sigma = _sigma_of(model_sampling, torch.linspace(first, last, points))
            self._table = timestep_bucket(sigma_to_timestep(sigma.float().cpu()) + EDGE)
        self._first, self._points_per_unit = first, (points - 1) / (last - first)
        self._followed = (model_sampling, sigmas)
        self.version += 1

    def tensors(self) -> tuple[Tensor, ...]:
        """What a recorded `observe` reads and writes, by address."""
        return self.bucket, self._table

    def observe(self, embedding: Tensor) -> None:
        """Update `bucket` from the sinusoidal embedding (B, C), any float dtype; no host sync.

        The error of the timestep read back is 1e-4 in fp32, 0.12 in fp16, 0.93 in bf16; a bucket is 15.6 wide.
        """
        if torch.compiler.is_compiling():
            self.bucket = compiled.bucket(embedding, self._number)
        else:
            self.update(embedding)

    def bucket_of(self, timesteps: Tensor) -> Tensor:
        """(B,) int64 of what the UNet is given as timesteps, (B,) of any dtype; no host sync."""
        if self._table.device != timesteps.device:
            self._table = self._table.to(timesteps.device)
        index = ((timesteps.float() - self._first) * self._points_per_unit).round_().clamp_(0, self._table.numel() - 1).long()
        return self._table.index_select(0, index)

    def update(self, embedding: Tensor) -> None:
        """As `observe`, outside of what torch.compile traces."""
        bucket = self.bucket_of(recover_timestep(embedding))
        key = (bucket.shape, bucket.device)
        if key not in self._buckets:
            self._buckets[key] = _plain_zeros(*key)
        self.bucket = self._buckets[key]
        self.bucket.copy_(bucket)
        if self.scales is not None:
            self.scales.follow(self.bucket)


def _sigma_of(model_sampling: nn.Module, timesteps: Tensor) -> Tensor:
    try:
        return model_sampling.sigma(timesteps)
    except RuntimeError:  # some samplings branch on the value, and so take one timestep at a time
        return torch.stack([torch.as_tensor(model_sampling.sigma(timestep)) for timestep in timesteps])


def _plain_zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    # A plain tensor can be updated inside and outside of inference mode; one born inside it only there.
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=torch.int64, device=device)


def recover_timestep(embedding: Tensor) -> Tensor:
    """(B, C) sinusoidal embedding -> (B,) fp32 timestep, for |t| up to 1000: the angle of one slow cos and sin pair."""
    half = embedding.shape[-1] // 2
    slowest = math.log(LARGEST_ANGLE / NUM_TIMESTEPS) / -math.log(MAX_PERIOD) * half
    k = min(math.ceil(slowest), half - 1)
    frequency = math.exp(-math.log(MAX_PERIOD) * k / half)
    return torch.atan2(embedding[:, half + k].float(), embedding[:, k].float()) / frequency
