"""The UNet's 16-bit ends: channels_last from the first convolution on, one pass for the last norm, and aside for whoever looks in."""

import copy

import pytest
import torch
from fused_blocks import layer_by_layer, unet_call
from torch import nn

from stepquant.hosts.comfy.quantize import quantize_model
from stepquant.kernels import dispatch

EXACT = 1e-5  # fp32 sums in another order


@pytest.fixture
def unet(model):
    patcher = quantize_model(model, "w8a8-token")
    unet_call(patcher)
    return patcher.model.diffusion_model


@pytest.fixture
def image():
    return torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)


def _stock_exit(unet, image):
    return nn.Sequential.forward(unet.out, image)


def test_the_first_convolution_gives_channels_last_and_what_its_class_gives(unet, relative_error):
    conv, x = unet.input_blocks[0][0], torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    y = conv(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, type(conv).forward(conv, x)) < EXACT


def test_the_last_layers_give_what_their_classes_give_as_nchw(unet, image, relative_error):
    y = unet.out(image)
    assert y.is_contiguous()
    assert relative_error(y, _stock_exit(unet, image)) < EXACT


def test_the_unets_output_is_nchw(model):
    assert unet_call(quantize_model(model, "w8a8-token")).is_contiguous()


def test_the_last_layers_step_aside_for_a_hook(unet, image, monkeypatch):
    monkeypatch.setattr(dispatch, "group_norm_silu", lambda *_: pytest.fail("the norm was passed by"))
    seen = []
    handle = unet.out[0].register_forward_hook(lambda module, args, output: seen.append(output))
    y = unet.out(image)
    handle.remove()
    assert len(seen) == 1 and torch.equal(y, _stock_exit(unet, image))


def test_a_copy_of_the_last_layers_runs_its_own(unet, image):
    twin = copy.deepcopy(unet.out)
    twin[2].bias = nn.Parameter(twin[2].bias + 1)
    assert torch.allclose(twin(image), unet.out(image) + 1, atol=1e-5)


def test_layer_by_layer_has_no_ends_of_ours(model):
    patcher = quantize_model(model, "w8a8-token")
    with layer_by_layer(patcher):
        ends = patcher.model.diffusion_model.input_blocks[0][0], patcher.model.diffusion_model.out
        assert not any("forward" in vars(end) for end in ends)
