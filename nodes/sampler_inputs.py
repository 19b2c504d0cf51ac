"""The inputs of nodes that sample: those of ComfyUI's KSampler, with the same names and ranges."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io


def conditioning_inputs() -> list[io.Input]:
    return [
        io.Conditioning.Input("positive", tooltip="The prompt, as connected to your KSampler."),
        io.Conditioning.Input("negative", tooltip="The negative prompt, as connected to your KSampler."),
        io.Latent.Input(
            "latent_image",
            tooltip="Sets the size of the pictures and how many are made at once. Use the size you work in: usually 1024 x 1024.",
        ),
    ]


def sampling_inputs() -> list[io.Input]:
    """seed, steps, cfg, sampler_name, scheduler, denoise."""
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="Seed of the first run; the next runs count up from it. Any value is good; keep it to repeat a result.",
        ),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps. Use what you sample with: usually 20 to 30."),
        io.Float.Input(
            "cfg",
            default=7.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="How strongly the prompt is followed. Use what you sample with: usually 5 to 8, and 1 for Turbo, LCM and Lightning.",
        ),
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="Use the sampler you work with. Usually euler."),
        io.Combo.Input(
            "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="Use the scheduler you work with. Usually normal or karras."
        ),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.01,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="1 starts from pure noise, as for text to image. Less starts from the latent image and visits only the last timesteps.",
        ),
    ]
