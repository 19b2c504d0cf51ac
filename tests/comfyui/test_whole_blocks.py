"""Transformer blocks in one piece: used where all is held and stock, with the values of the careful way, and given up for anything else."""

import gc
import weakref

import comfy.ldm.modules.attention as attention
import pytest
import torch
from fused_blocks import unet_call

from stepquant.hosts.comfy.attach import counting_macs, state_of
from stepquant.hosts.comfy.blocks import transformer
from stepquant.hosts.comfy.quantize import quantize_model
from stepquant.hosts.low_rank import LowRankBranch

BLOCKS = 17
SAME = 1e-6  # both ways compute the same products; only attention may add in another order
BLOCK = "input_blocks.4.1.transformer_blocks.0"


@pytest.fixture
def whole(monkeypatch) -> list:
    """The weights that each block was run on in one piece; attention is PyTorch's."""
    seen: list = []
    run = transformer.transformer_block

    def noted(x, k, v, block):
        seen.append(block)
        return run(x, k, v, block)

    monkeypatch.setattr(transformer, "transformer_block", noted)
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    return seen


def _carefully(monkeypatch, patcher, **options):
    with monkeypatch.context() as patch:
        patch.setattr(transformer, "is_torch_attention", lambda _: False)
        return unet_call(patcher, **options)


def _loaded(monkeypatch, patcher) -> None:
    """Between the steps of a run nothing is loaded anew."""
    monkeypatch.setattr(patcher, "load", lambda *_, **__: None)
    monkeypatch.setattr(patcher, "pre_run", lambda: None)


@pytest.mark.parametrize("preset", ["w8a8-token", "w4a8-token", "w8a8-fp8"])
@pytest.mark.parametrize(("batch", "side"), [(1, 8), (2, 16)])
def test_whole_blocks_give_what_their_layers_give_one_by_one(model, whole, monkeypatch, relative_error, preset, batch, side):
    patcher = quantize_model(model, preset)
    expected = _carefully(monkeypatch, patcher, batch=batch, side=side)
    assert not whole
    for _ in range(2):
        found = unet_call(patcher, batch=batch, side=side)
        assert relative_error(found, expected) < SAME
    assert len(whole) > BLOCKS  # blocks with a layer of 16 bits are not whole


def test_whole_blocks_gather_their_weights_once(model, whole, monkeypatch):
    patcher = quantize_model(model, "w8a8-token")
    unet_call(patcher)
    _loaded(monkeypatch, patcher)
    first, whole[:] = list(whole), []
    unet_call(patcher, seed=1)
    assert first and all(now is then for now, then in zip(whole, first, strict=True))


def test_whole_blocks_are_not_used_while_somebody_else_has_a_word(model, whole):
    patcher = quantize_model(model, "w8a8-token")
    unet_call(patcher, options={"optimized_attention_override": lambda function, *args, **kwargs: function(*args, **kwargs)})
    with counting_macs(patcher.model):
        unet_call(patcher)
    attention.optimized_attention = attention.attention_sub_quad
    unet_call(patcher)
    assert not whole


def test_whole_blocks_give_way_to_patches_of_attention(model, whole):
    patcher, asked = quantize_model(model, "w8a8-token"), []

    def patch(q, k, v, extra):
        asked.append(extra["block"])
        return q, k, v

    unet_call(patcher, options={"patches": {"attn1_patch": [patch]}})
    assert asked and not whole


def test_whole_blocks_leave_a_block_with_a_branch_to_its_layers(model, whole, monkeypatch, relative_error):
    patcher = quantize_model(model, "w8a8-token")
    unet_call(patcher)
    _loaded(monkeypatch, patcher)
    usual, whole[:] = len(whole), []
    layer = patcher.model.diffusion_model.get_submodule(f"{BLOCK}.attn1.to_q")
    out, into = layer.weight.shape
    layer.branch = LowRankBranch(down=torch.ones(2, into) / into, up=torch.ones(out, 2))
    state_of(patcher).patch_version += 1
    with_branch = unet_call(patcher)
    assert len(whole) == usual - 1
    assert relative_error(with_branch, _carefully(monkeypatch, patcher)) < SAME
    layer.branch = None
    state_of(patcher).patch_version += 1
    whole.clear()
    unet_call(patcher)
    assert len(whole) == usual


def test_whole_blocks_follow_a_weight_that_is_replaced(model, whole, monkeypatch, relative_error):
    patcher = quantize_model(model, "w8a8-token")
    before = unet_call(patcher)
    _loaded(monkeypatch, patcher)
    layer = patcher.model.diffusion_model.get_submodule(f"{BLOCK}.attn1.to_q")
    layer.requantize(layer.weight.dequantize() * 3)
    after = unet_call(patcher)
    assert relative_error(after, before) > SAME
    assert relative_error(after, _carefully(monkeypatch, patcher)) < SAME


def test_whole_blocks_keep_no_weights_alive_when_the_run_is_over(model, whole):
    patcher = quantize_model(model, "w8a8-token")
    unet_call(patcher)
    references = [weakref.ref(block.own.layers[0]) for block in whole]
    whole.clear()
    patcher.cleanup()
    gc.collect()
    assert references and not any(reference() for reference in references)
