"""Samples latents from modules in training, for the sheets; the shipped model is sampled by its own pipeline instead."""

from __future__ import annotations

import torch
from torch import Tensor

from ..architecture import build_scheduler
from .data import SIZE


@torch.no_grad()
def sample_latents(
    unet: torch.nn.Module,
    prompt: tuple[Tensor, Tensor],
    empty: tuple[Tensor, Tensor],
    steps: int = 20,
    guidance: float = 5.0,
    seed: int = 0,
) -> Tensor:
    """Euler sampling with classifier-free guidance; whole 256 px pictures.

    Args:
        prompt: context (B, 77, 320) and pooled (B, 192). empty: the same of the empty caption, (1, ...).
        seed: of the starting noise, drawn on the CPU.
    Returns: (B, 4, 32, 32) fp32.
    """
    context, pooled = (torch.cat([e.expand_as(p), p]) for e, p in zip(empty, prompt, strict=True))
    count, device = len(prompt[0]), prompt[0].device
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps, device=device)
    noise = torch.randn(count, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(seed))
    latents = noise.to(device) * scheduler.init_noise_sigma
    sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]], device=device).expand(2 * count, 6)
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(latents, timestep).repeat(2, 1, 1, 1)
        conditions = {"text_embeds": pooled, "time_ids": sizes}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            eps = unet(model_input, timestep, encoder_hidden_states=context, added_cond_kwargs=conditions).sample
        eps_empty, eps_prompt = eps.float().chunk(2)
        eps = eps_empty + guidance * (eps_prompt - eps_empty)
        latents = scheduler.step(eps, timestep, latents).prev_sample
    return latents
