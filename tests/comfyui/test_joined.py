"""The skip-concats of the decoder: never made where only our blocks read them, made as ever where anything else does."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from fused_blocks import unet_call
from stock_nodes import NODES

from stepquant.hosts.comfy.blocks.joined import Joinable, JoinableOutput, Joined
from stepquant.hosts.comfy.quantize import quantize_model

DECODER_BLOCKS = 9


@contextmanager
def without_joining(patcher):
    """ComfyUI's torch.cat joins as ever."""
    modules = [module for module in patcher.model.diffusion_model.modules() if is_joinable(module)]
    assert len(modules) == DECODER_BLOCKS
    forwards = [module.forward for module in modules]
    for module in modules:
        module.forward = module.forward.__self__._forward
    try:
        yield
    finally:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward


def is_joinable(module) -> bool:
    return isinstance(getattr(module.__dict__.get("forward"), "__self__", None), JoinableOutput)


def made_during(call, monkeypatch) -> int:
    """How many Joined a call makes."""
    made, whole = [], Joined.whole
    with monkeypatch.context() as patch:
        patch.setattr(Joined, "whole", lambda self: made.append(self.made is None) or whole(self))
        call()
    return sum(made)


@pytest.mark.parametrize("preset", ["w8a8-token", "w8a8-fp8"])
def test_joined_blocks_give_what_the_concatenation_gives_and_never_make_it(model, monkeypatch, preset):
    patcher = quantize_model(model, preset)
    with without_joining(patcher):
        expected = unet_call(patcher)
    results = []
    assert made_during(lambda: results.append(unet_call(patcher)), monkeypatch) == 0
    assert torch.equal(results[0], expected)
    assert type(results[0]) is torch.Tensor


def test_joined_blocks_of_a_copied_model_are_its_own(quantized):
    expected = unet_call(quantized)
    unet = quantized.model.diffusion_model
    twin = copy.deepcopy(unet, {id(weight): weight for weight in unet.parameters()})  # QuantizedTensors refuse to be copied
    assert sum(map(is_joinable, twin.modules())) == DECODER_BLOCKS
    owners = [module.forward.__self__._forward.__self__._block() for module in twin.modules() if is_joinable(module)]
    assert all(any(owner is module for module in twin.modules()) for owner in owners)
    assert torch.equal(unet_call(quantized), expected)


@pytest.mark.parametrize("kind", ["FreeU", "forward hook", "control", "output_block_patch", "LoRA"])
def test_joined_blocks_give_the_same_where_something_else_takes_part(quantized, add_lora, monkeypatch, kind):
    options, control, patcher = {}, None, quantized
    if kind == "FreeU":
        patcher = NODES["FreeU"](quantized)
        options = patcher.model_options["transformer_options"]
    elif kind == "control":
        generator = torch.Generator().manual_seed(5)
        shapes = shapes_of_skips(quantized)
        control = {"output": [torch.randn(shape, generator=generator) for shape in shapes]}
    elif kind == "output_block_patch":
        options = {"patches": {"output_block_patch": [lambda h, hsp, options: (h * 1.5, hsp.flip(-1))]}}
    elif kind == "LoRA":
        patcher = add_lora(quantized)
    seen = []
    if kind == "forward hook":
        block = patcher.model.diffusion_model.output_blocks[1][0]
        block.register_forward_pre_hook(lambda module, args: seen.append(float(args[0].mean())))
    with without_joining(patcher):
        expected = unet_call(patcher, options, control)
    fused = unet_call(patcher, options, control)
    assert torch.equal(fused, expected)
    assert len(set(seen)) == (kind == "forward hook")


def shapes_of_skips(patcher) -> list[tuple[int, ...]]:
    """Of the skips, in the order in which ControlNet's lists are read: last block first."""
    shapes = []
    patch = {"patches": {"input_block_patch_after_skip": [lambda h, options: shapes.append(tuple(h.shape)) or h]}}
    unet_call(patcher, patch)
    return shapes


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def images(generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 6, 4, 5, generator=generator)


def test_joined_is_the_concatenation_to_every_use_of_a_tensor(generator):
    first, second = images(generator)
    expected = torch.cat((first, second), 1)
    for use in (
        lambda x: x + 1,
        lambda x: x[:, 2:4],
        lambda x: torch.nn.functional.silu(x),
        lambda x: torch.cat([x, x], 1),
        lambda x: x.permute(0, 2, 3, 1).contiguous(),
        lambda x: x.mean((2, 3), keepdim=True),
        lambda x: torch.stack([x, first.new_zeros(x.shape)]),
    ):
        joined = torch.cat([first.as_subclass(Joinable), second], dim=1)
        assert isinstance(joined, Joined) and joined.made is None
        result = use(joined)
        assert type(result) is torch.Tensor and torch.equal(result, use(expected))


def test_joined_tells_its_shape_type_and_place_without_being_made(generator):
    first, second = images(generator)
    joined = torch.cat([first.as_subclass(Joinable), second], dim=1)
    assert (joined.shape, joined.ndim, joined.dtype, joined.device, joined.numel()) == ((2, 9, 4, 5), 4, torch.float32, first.device, 360)
    assert joined.size(1) == 9 and joined.is_floating_point() and joined.made is None
    assert joined.data_ptr() == joined.whole().data_ptr()


@pytest.mark.parametrize("dim", [0, 2, -1])
def test_joinable_joins_along_other_dimensions_as_ever(generator, dim):
    first, _ = images(generator)
    result = torch.cat([first.as_subclass(Joinable), first], dim=dim)
    assert type(result) is torch.Tensor and torch.equal(result, torch.cat([first, first], dim))


def test_joinable_is_an_ordinary_tensor_to_everything_else(generator):
    first, second = images(generator)
    h = first.as_subclass(Joinable)
    assert type(h * 2) is torch.Tensor and torch.equal(h * 2, first * 2)
    assert type(torch.cat([h, second, second], 1)) is torch.Tensor
    assert type(torch.cat([h.double(), second.double()], 1)) is torch.Tensor
    h[:, :1] = 0
    assert first[:, :1].eq(0).all()
