"""Nets that steer from outside of the UNet: their residuals and tokens meet the quantized layers."""

import pytest
import torch
from sampling_run import conditioning, sample_latent

from nodes import ControlNetApplyAdvanced

from .artist import tiny_controlnet, tiny_t2i_adapter, with_ip_adapter


@pytest.fixture(scope="module")
def controlnet(tmp_path_factory):
    with torch.inference_mode():
        return tiny_controlnet(tmp_path_factory.mktemp("controlnet"))


def _controlled(model, net, start: float = 0.0, end: float = 1.0, strength: float = 1.0, **how):
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(3))
    prompts = ControlNetApplyAdvanced().apply_controlnet(conditioning(11), conditioning(12), net, image, strength, start, end)
    return sample_latent(model, positive=prompts[0], negative=prompts[1], **how)


def test_controlnet(contract, controlnet):
    contract("ControlNet", lambda model: _controlled(model, controlnet))


def test_controlnet_for_a_part_of_the_steps(contract, controlnet):
    contract("ControlNet, part of the steps", lambda model: _controlled(model, controlnet, 0.2, 0.7, steps=4))


def test_controlnet_with_a_lora(contract, controlnet, add_lora):
    contract("ControlNet and LoRA", lambda model: _controlled(add_lora(model), controlnet))


def test_t2i_adapter(contract):
    net = tiny_t2i_adapter()
    contract("T2I-Adapter", lambda model: _controlled(model, net))


def test_ip_adapter(contract):
    contract("IPAdapter-like (attn2 replaced)", lambda model: sample_latent(with_ip_adapter(model)))
