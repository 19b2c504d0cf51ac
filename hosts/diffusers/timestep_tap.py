"""Tells the quantized layers which timestep bucket each sample of the running UNet call is in. Holds no scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...quant.timestep import sigma_to_timestep, timestep_bucket

# EDM's noise conditioning is c_noise = 0.25 ln(sigma) (Karras et al., arXiv 2206.00364, table 1).
EDM_LOG_SIGMA_FACTOR = 0.25


class TimestepTap:
    """A forward pre-hook on a diffusers UNet that keeps `bucket`, (B,) int64 on the sample's device; None before a call.

    One tap belongs to one UNet and is shared by all its quantized layers; a deep copy of the UNet carries a tap
    of its own.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.bucket: Tensor | None = None
        self.takes_edm_noise = False
        self._handle = unet.register_forward_pre_hook(self._before_unet, with_kwargs=True)

    @property
    def buckets(self) -> list[int]:
        """`bucket` as numbers; waits for the device."""
        return [] if self.bucket is None else self.bucket.tolist()

    def follow(self, scheduler: object) -> None:
        """Read from a diffusers scheduler in which unit the UNet will be given its timestep."""
        self.takes_edm_noise = gives_edm_noise(scheduler)

    def remove(self) -> None:
        self._handle.remove()

    def _before_unet(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])  # (B,)
        if self.takes_edm_noise:
            timestep = sigma_to_timestep((timestep.float() / EDM_LOG_SIGMA_FACTOR).exp())
        self.bucket = timestep_bucket(timestep)


def gives_edm_noise(scheduler: object) -> bool:
    """True if the scheduler hands the UNet 0.25 ln(sigma) instead of a timestep in [0, 1000)."""
    config = getattr(scheduler, "config", {})
    return type(scheduler).__name__.startswith("EDM") or config.get("timestep_type") == "continuous"
