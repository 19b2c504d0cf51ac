"""One sampling run of the tiny SDXL as KSampler makes it, with everything that a test may want to vary. Loads no model."""

from __future__ import annotations

import comfy.memory_management
import comfy.model_management
import comfy.model_prefetch
import comfy.sample
import comfy_aimdo.model_vbar
import tiny_sdxl
import torch


def conditioning(seed: int, tokens: int = 77, width: int = tiny_sdxl.CLIP_L + tiny_sdxl.CLIP_G, **entries: object) -> list:
    """A prompt's embedding: random, the same for a seed. entries: what conditioning nodes add, such as hooks or an area."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(1, tokens, width, generator=generator)
    pooled = torch.randn(1, tiny_sdxl.CLIP_G, generator=generator)
    return [[embedding, {"pooled_output": pooled, **{name: value for name, value in entries.items() if value is not None}}]]


def sample_latent(
    model,
    steps: int = 2,
    seed: int = 1,
    batch: int = 1,
    hooks=None,
    negative_hooks=None,
    cfg: float = 4.0,
    size: tuple[int, int] = (8, 8),
    positive: list | None = None,
    negative: list | None = None,
    sampler: str = "euler",
    scheduler: str = "normal",
) -> torch.Tensor:
    """The final latent (batch, 4, height, width) fp32."""
    latent = torch.zeros(batch, 4, *size)
    noise = comfy.sample.prepare_noise(latent, seed)
    positive = positive or conditioning(11, hooks=hooks)
    negative = negative or conditioning(12, hooks=negative_hooks)
    try:
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, disable_pbar=True, seed=seed
        ).float()
    finally:
        _end_node()


def _end_node() -> None:
    """What ComfyUI's executor does after every node under dynamic VRAM. Else the pinned copies of all patches ever tried pile up."""
    if comfy.memory_management.aimdo_enabled:
        comfy.model_management.reset_cast_buffers()
        comfy.model_prefetch.cleanup_prefetch_queues()
        comfy_aimdo.model_vbar.vbars_reset_watermark_limits()
