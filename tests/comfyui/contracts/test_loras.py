"""LoRAs through ComfyUI's own loader, in all the kinds artists download; beside the int8 layers where that is exact."""

import comfy.sd
import pytest
import tiny_sdxl
import torch
from sampling_run import sample_latent

from .artist import with_adapter
from .subjects import ON_CPU, another, is_same


def test_lora(contract, add_lora):
    contract("LoRA (LoraLoader)", lambda model: sample_latent(add_lora(model)))


def test_stacked_loras(contract, add_lora):
    contract("LoRAs, two stacked", lambda model: sample_latent(add_lora(add_lora(model, 0.8), -0.5, seed=5)))


def test_convolution_lora(contract, add_lora):
    contract("LoRA on convolutions", lambda model: sample_latent(add_lora(model, 2.0, only="input_blocks_4_0")))


def test_alternating_clones(contract, add_lora):
    def use(model):
        first, second = add_lora(model), add_lora(model, -0.7, seed=5)
        results = [sample_latent(one) for one in (first, second, model, first)]
        assert is_same(results[0], results[3]), "a LoRA of the other clone stayed on"
        return torch.cat(results[:3])

    contract("LoRAs on two clones in turn", use)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("dora", "DoRA"),
        ("loha", "LyCORIS LoHa"),
        ("lokr", "LyCORIS LoKr"),
        ("locon_mid", "LyCORIS LoCon, Tucker"),
        ("diff", "weight difference"),
    ],
)
def test_adapter_that_is_merged(contract, kind, name):
    contract(f"{name} (merged)", lambda model: sample_latent(with_adapter(model, kind)))


def test_adapter_on_top_of_a_lora(contract, add_lora):
    contract("LoRA and DoRA on one layer", lambda model: sample_latent(with_adapter(add_lora(model), "dora")))


def test_bypass_lora(contract):
    """LoraLoaderBypass: ComfyUI wraps the layers' forwards while sampling."""

    def use(model):
        return sample_latent(comfy.sd.load_bypass_lora_for_models(model, None, tiny_sdxl.lora_tensors(), 1.0, 0)[0])

    contract("LoRA (LoraLoaderBypass)", use)


def test_bypass_lora_beside_a_stock_one(contract, add_lora):
    def use(model):
        return sample_latent(comfy.sd.load_bypass_lora_for_models(add_lora(model), None, tiny_sdxl.lora_tensors(5), 1.0, 0)[0])

    contract("LoraLoaderBypass after LoraLoader", use)


def test_lora_before_quantizing(family, add_lora, relative_error, mode):
    """A LoRA that is on the model when it is quantized stays exact: it is carried over, not baked in."""
    from stepquant.hosts.comfy.quantize import quantize_model

    from .subjects import acceleration_of

    after = sample_latent(add_lora(quantize_model(family().reference.model, "w8a8-token", acceleration=acceleration_of(mode))))
    before = sample_latent(quantize_model(add_lora(family().reference.model), "w8a8-token", acceleration=acceleration_of(mode)))
    assert relative_error(before, after) < 1e-5


@pytest.mark.skipif(not ON_CPU, reason="needs fp32; benchmarks/dynamic_vram.py compares a LoRA on a GPU with fp16's own noise")
@pytest.mark.parametrize("only", ["", "input_blocks_4_0"], ids=["all", "convolutions"])
def test_lora_branch_is_exact(weight_only, dequantized, add_lora, unet_call, relative_error, only):
    """One UNet call in fp32 with float activations, so that nothing but the branch can differ."""
    results = []
    for model in (weight_only, dequantized(weight_only)):
        one = add_lora(add_lora(model, 0.8, only=only), -0.5, seed=5, only=only)
        one.load(torch.device("cpu"), full_load=True)
        results.append(unet_call(one, (3.0,)))
    assert relative_error(*results) < 1e-5


def test_two_models_in_one_graph(contract, add_lora):
    def use(model):
        other = add_lora(another(model), -0.7, seed=5)
        results = [sample_latent(one, steps=2) for one in (model, other, model)]
        assert is_same(results[0], results[2]), "the second model changed the first"
        return torch.cat(results[:2])

    contract("two models in one graph", use)
