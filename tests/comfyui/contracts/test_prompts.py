"""What prompts, sizes and settings do to a call of the UNet: batches, areas, long prompts, odd sizes, no CFG."""

import comfy.model_management
import pytest
import torch
from sampling_run import conditioning, sample_latent


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_batch(contract, batch):
    contract(f"batch of {batch}", lambda model: sample_latent(model, batch=batch))


def test_no_cfg(contract):
    contract("cfg 1", lambda model: sample_latent(model, cfg=1.0))


def test_long_prompt(contract):
    contract("prompt of 154 tokens", lambda model: sample_latent(model, positive=conditioning(11, 154)))


@pytest.mark.parametrize("size", [(9, 13), (16, 24)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_size(contract, size):
    contract(f"latent of {size[0]} x {size[1]}", lambda model: sample_latent(model, size=size))


def test_areas(contract):
    def use(model):
        left, right = conditioning(11, area=(8, 4, 0, 0)), conditioning(13, area=(8, 6, 0, 2), strength=0.8)
        return sample_latent(model, positive=left + right + conditioning(14))

    contract("regional prompts (areas)", use)


def test_masks(contract):
    def use(model):
        mask = torch.zeros(1, 8, 8)
        mask[:, :, :4] = 1
        return sample_latent(
            model, positive=conditioning(11, mask=mask, mask_strength=1.0) + conditioning(13, mask=1 - mask, mask_strength=0.7)
        )

    contract("regional prompts (masks)", use)


def test_prompts_for_parts_of_the_steps(contract):
    def use(model):
        return sample_latent(
            model,
            steps=4,
            positive=conditioning(11, start_percent=0.0, end_percent=0.5) + conditioning(13, start_percent=0.3, end_percent=1.0),
        )

    contract("prompts for parts of the steps", use)


def test_timesteps_mixed_in_a_batch(contract, unet_call):
    def use(model):
        comfy.model_management.load_models_gpu([model])
        return unet_call(model, (14.0, 2.9, 0.3)).clone()

    contract("different timesteps in one batch", use)


def test_sampler_that_adds_noise(contract):
    def use(model):
        torch.manual_seed(0)
        return sample_latent(model, steps=3, sampler="dpmpp_2m_sde", scheduler="karras")

    contract("sampler dpmpp_2m_sde, karras", use)
