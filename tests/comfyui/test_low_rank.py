"""Branches of a file in ComfyUI: sampling, files, LoRAs on top, merges, stock saving, memory and tuned scales all know of them."""

from dataclasses import replace

import pytest
import torch
from fused_blocks import unet_call

from stepquant.hosts.comfy.attach import state_of
from stepquant.hosts.comfy.dense_saving import dense_state_dict
from stepquant.hosts.comfy.layouts import unpack
from stepquant.hosts.comfy.loader import load_quantized
from stepquant.hosts.comfy.lora import quantized_layers
from stepquant.hosts.comfy.quantize import quantizable_layers, quantize_model, weight_reader
from stepquant.hosts.comfy.save import save_quantized
from stepquant.hosts.comfy.scale_bank import ScaleBank
from stepquant.quant.file_format import read_header
from stepquant.quant.low_rank import low_rank_bytes
from stepquant.quant.recipe import preset_recipe
from stepquant.quant.sqnr import sqnr_db
from stepquant.quant.tuning.scale_set import ScaleSet

UNET = "diffusion_model."
RANK = 4
FF = "middle_block.1.transformer_blocks.0.ff"
TO_Q, TO_OUT, FIRST, SECOND, PROJ_IN = (
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0",
    f"{FF}.net.0.proj",
    f"{FF}.net.2",
    "input_blocks.4.1.proj_in",
)
WITH_BRANCHES = (TO_Q, TO_OUT, FIRST, SECOND, PROJ_IN)


def _recipe(model, names=WITH_BRANCHES, rank=RANK):
    recipe = preset_recipe("w4a8-token", quantizable_layers(model))
    schemes = {name: replace(scheme, rank=rank) if name in names else scheme for name, scheme in recipe.schemes.items()}
    return replace(recipe, schemes=schemes)


@pytest.fixture
def branched(model):
    return quantize_model(model, _recipe(model))


def _layer(patcher, name):
    return patcher.model.get_submodule(UNET + name)


@pytest.mark.parametrize("name", WITH_BRANCHES)
def test_a_layers_weight_is_its_codes_and_its_branch(model, branched, name):
    weight, live = weight_reader(model)(name), _layer(branched, name).weight
    alone = _layer(quantize_model(model, "w4a8-token"), name).weight
    parts = unpack(live)
    assert parts.branch.down.shape == (RANK, weight.shape[1]) and parts.branch.up.shape == (weight.shape[0], RANK)
    assert sqnr_db(weight, live.dequantize().float()) > sqnr_db(weight, alone.dequantize().float()) + 0.2
    x = torch.randn(1, 6, weight.shape[1], generator=torch.Generator().manual_seed(0))
    layer = _layer(branched, name)
    expected = torch.nn.functional.linear(x, live.dequantize().float(), None if layer.bias is None else layer.bias.float())
    assert sqnr_db(expected, layer(x.to(layer.compute_dtype)).float()) > 35


def test_blocks_with_branches_give_what_layers_one_by_one_give(model, branched, add_lora):
    alone = quantize_model(model, _recipe(model), acceleration="off")
    assert sqnr_db(unet_call(alone), unet_call(branched)) > 15  # norms are rounded once less
    plain = unet_call(quantize_model(model, "w4a8-token"))
    assert not torch.equal(plain, unet_call(branched))
    with_lora = [unet_call(add_lora(one)) for one in (alone, branched)]
    assert sqnr_db(*with_lora) > 15


def test_a_file_with_branches_comes_back_bit_for_bit(branched, sample, tmp_path):
    save_quantized(branched, tmp_path / "branched.safetensors")
    assert read_header(tmp_path / "branched.safetensors").version == 2
    loaded = load_quantized(tmp_path / "branched.safetensors").model
    assert torch.equal(sample(loaded), sample(branched))
    save_quantized(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").stat().st_size == (tmp_path / "branched.safetensors").stat().st_size


def test_a_lora_runs_beside_the_branch_and_goes_again(branched, sample, add_lora):
    name = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    before, layer = sample(branched), _layer(branched, name)
    x = torch.randn(1, 6, layer.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(layer.compute_dtype)
    alone = layer(x)
    with_lora = add_lora(branched)
    sample(with_lora)
    assert layer.branch is not None and unpack(layer.weight).branch is not None
    assert torch.allclose(layer(x) - alone, layer.branch.linear(x), atol=1e-5)
    assert torch.equal(sample(branched), before)


def test_a_merge_keeps_the_branch_and_rounds_what_it_leaves(branched, sample):
    layer = _layer(branched, TO_Q)
    dense, branch = layer.weight.dequantize().float(), unpack(layer.weight).branch
    delta = torch.randn(dense.shape, generator=torch.Generator().manual_seed(3)) * 0.05
    before, patched = sample(branched), branched.clone()
    # Half of the weight and something added: a branch that a merge forgot would count twice or not at all.
    patched.add_patches({f"{UNET}{TO_Q}.weight": ("diff", (delta,))}, 1.0, 0.5)
    sample(patched)
    merged = layer.weight
    assert torch.equal(unpack(merged).branch.up, branch.up)
    assert sqnr_db(0.5 * dense + delta, merged.dequantize().float()) > 15
    assert torch.equal(sample(branched), before)


def test_stock_saving_writes_the_whole_weight(branched):
    unet = {key.removeprefix(UNET): tensor for key, tensor in branched.model.state_dict().items() if key.startswith(UNET)}
    dense = dense_state_dict(branched.model, unet)[f"{TO_Q}.weight"]
    assert torch.allclose(dense.float(), _layer(branched, TO_Q).weight.dequantize().float(), atol=1e-3)


def test_comfyui_is_told_of_the_branchs_memory(model, branched):
    alone = quantize_model(model, "w4a8-token")
    expected = sum(low_rank_bytes(tuple(_layer(branched, name).weight.shape), RANK) for name in WITH_BRANCHES)
    assert abs(branched.model_size() - alone.model_size() - expected) <= 32 * len(WITH_BRANCHES)


def test_tuned_scales_multiply_the_branch_too(branched):
    layer = _layer(branched, TO_Q)
    N, K = layer.weight.shape
    x = torch.randn(1, 6, K, generator=torch.Generator().manual_seed(0)).to(layer.compute_dtype)
    before = layer(x)
    layer.scales = ScaleBank(((ScaleSet(1, {TO_Q: torch.full((1, N), 2.0).log()}, {}), 1.0),), x.device)
    assert torch.allclose(layer(x), 2 * before, rtol=1e-4, atol=1e-5)


def test_every_layer_knows_whether_a_branch_wants_its_float_input(branched):
    with_branch = {key.removeprefix(UNET).removesuffix(".weight") for key, layer in quantized_layers(branched.model) if layer.has_branch}
    assert with_branch == set(WITH_BRANCHES) == {name for name, scheme in state_of(branched).recipe.schemes.items() if scheme.rank}


def test_a_node_that_edits_weights_while_they_are_fetched_edits_codes_and_branch_together(branched):
    layer = _layer(branched, TO_Q)
    x = torch.randn(1, 6, layer.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(layer.compute_dtype)
    layer.weight_function = [lambda weight: 0.5 * weight]  # the list it has is its class's
    expected = torch.nn.functional.linear(x, 0.5 * layer.weight.dequantize().to(x.dtype))
    assert torch.allclose(layer(x), expected, atol=1e-3)
