"""Attention schemes on a diffusers UNet: near the float UNet, by layer, through a file, refused by name."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from stepquant.errors import SchemeError
from stepquant.quant.log2_attention import AttentionMode, AttentionScheme
from stepquant.quant.recipe import Recipe
from stepquant.quant.sqnr import sqnr_db

diffusers = pytest.importorskip("diffusers", reason="the embedded engine needs diffusers (stepquant[demo])")
from stepquant.hosts.diffusers.attention import QuantizedAttentionProcessor, attention_layers, set_attention  # noqa: E402
from stepquant.hosts.diffusers.quantize import quantize_unet  # noqa: E402
from stepquant.hosts.diffusers.unet_file import load, save  # noqa: E402

LOG2, INT8 = AttentionScheme(AttentionMode.LOG2, 8), AttentionScheme(AttentionMode.INT8_QK)


@pytest.fixture(scope="module")
def original(tiny_sdxl_config):
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**tiny_sdxl_config).half().float().eval().requires_grad_(False)


@pytest.fixture
def unet(original):
    return copy.deepcopy(original)


def ask(unet):
    generator = torch.Generator().manual_seed(1)
    sample, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 48, generator=generator)
    context[:, 0] *= 80
    conditions = {"text_embeds": torch.randn(2, 16, generator=generator), "time_ids": torch.ones(2, 6)}
    with torch.inference_mode():
        return unet(sample, torch.tensor(500), context, added_cond_kwargs=conditions).sample


# One code per octave is an error of 20 % in every probability: 14 dB where values are random and maps flat, as here.
@pytest.mark.parametrize(("scheme", "least"), [(LOG2, 9), (replace(LOG2, bits=4), 9), (INT8, 25)], ids=["log2", "log2 4 bit", "int8 qk"])
def test_quantized_attention_stays_near_the_float_unet(unet, scheme, least):
    expected = ask(unet)
    set_attention(unet, dict.fromkeys(attention_layers(unet), scheme))
    answer = ask(unet)
    assert not torch.equal(answer, expected)
    assert sqnr_db(expected, answer) > least


def test_set_attention_changes_the_named_layers_alone_and_float_gives_the_engines_own_back(unet):
    expected, layers = ask(unet), attention_layers(unet)
    cross = [name for name in layers if name.endswith("attn2")]
    set_attention(unet, dict.fromkeys(cross, LOG2))
    processors = unet.attn_processors.values()
    assert sum(isinstance(processor, QuantizedAttentionProcessor) for processor in processors) == len(cross) == len(layers) // 2
    set_attention(unet, dict.fromkeys(cross, AttentionScheme()))
    assert torch.equal(ask(unet), expected)


def test_recipe_carries_attention_through_a_file(unet, original, tmp_path):
    layers = attention_layers(unet)
    recipe = Recipe({}, "test", "test", attention={layers[0]: LOG2, layers[1]: replace(INT8, keep_start=False)})
    quantize_unet(unet, recipe)
    save(unet, tmp_path / "unet.safetensors")
    loaded = load(copy.deepcopy(original), tmp_path / "unet.safetensors")
    assert torch.equal(ask(loaded), ask(unet))
    assert Recipe.from_json(recipe.to_json(), "test") == recipe


def test_quantize_unet_refuses_an_attention_layer_that_is_none(unet):
    before = ask(unet)
    with pytest.raises(SchemeError, match=r"middle_block\.9\.attn1: in the recipe, but no attention layer"):
        quantize_unet(unet, Recipe({}, "test", "test", attention={"middle_block.9.attn1": LOG2}))
    assert torch.equal(ask(unet), before)


@pytest.mark.parametrize("change", [{"mode": "log3"}, {"bits": 3}, {"keep_start": None, "bits": "x"}], ids=str)
def test_recipe_names_the_layer_when_its_attention_is_unknown(change):
    data = Recipe({}, "test", "test", attention={"middle_block.1.attn1": LOG2}).to_json()
    data["attention"]["middle_block.1.attn1"] |= change
    with pytest.raises(SchemeError, match="attention"):
        Recipe.from_json(data, "test")
