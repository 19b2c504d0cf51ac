"""16-bit codes (token16) in ComfyUI: quality, blocks, LoRAs, merges, files and batches of timesteps, beside layers of other schemes."""

import pytest
import torch
from fake_graph import use_fake_graphs
from fused_blocks import calls_of, layer_by_layer, producer_calls, unet_call

from stepquant.hosts.acceleration import Acceleration
from stepquant.hosts.comfy.attach import counting_macs, state_of
from stepquant.hosts.comfy.loader import load_quantized
from stepquant.hosts.comfy.lora import quantized_layers
from stepquant.hosts.comfy.quantize import quantizable_layers, quantize_model
from stepquant.hosts.comfy.save import save_quantized
from stepquant.quant.recipe import Recipe
from stepquant.quant.scheme import TOKEN16, ActivationMode, ComputeType, Scheme, token_scheme
from stepquant.quant.sqnr import sqnr_db

WEIGHT_ONLY = Scheme(activation=ActivationMode.FP16, compute=ComputeType.FP16)
TO_Q = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
CONV = "diffusion_model.input_blocks.1.0.in_layers.2.weight"
CONVS = ("in_layers.2", "out_layers.3", "skip_connection", ".op", ".conv")


def quantized(model, scheme_of, **options):
    return quantize_model(model, Recipe({name: scheme_of(name) for name in quantizable_layers(model)}, "test", "test"), **options)


@pytest.fixture
def wide(model):
    """Every layer with 16-bit codes."""
    return quantized(model, lambda name: TOKEN16)


def test_wide_codes_are_as_good_as_float_inputs_and_all_integer(model, wide):
    """Against the same int8 weights on floats: what the codes lose is far below what 8-bit codes lose."""
    exact = unet_call(quantized(model, lambda name: WEIGHT_ONLY))
    with counting_macs(wide.model) as counter:
        result = unet_call(wide)
    assert counter.integer_share() == 1.0
    eight_bits = sqnr_db(exact, unet_call(quantized(model, token_scheme)))
    assert sqnr_db(exact, result) > max(eight_bits + 25, 50)


def test_wide_convolutions_are_fused_with_their_norms_and_linears_step_aside(model, wide, relative_error):
    with producer_calls() as calls:
        fused = unet_call(wide)
    with layer_by_layer(wide), producer_calls() as none:
        expected = unet_call(wide)
    assert not none
    assert set(calls) == {"group_norm_silu_quantize"} and calls["group_norm_silu_quantize"] == 34  # two of each of 17 ResBlocks
    assert relative_error(fused, expected) < 1e-3


@pytest.mark.parametrize("others", ["attn1.to_k", "ff.net.0.proj", "ff.net.2", "to_out.0", "in_layers.2", "skip_connection", "proj_in"])
def test_wide_layers_run_beside_layers_of_other_schemes(model, relative_error, others):
    patcher = quantized(model, lambda name: TOKEN16 if name.endswith(others) else token_scheme(name))
    for kind in ("BasicTransformerBlock", "ResBlock"):
        errors = [relative_error(block(*args, **kwargs), output) for block, args, kwargs, output in calls_of(patcher, kind)]
        assert len(errors) == 17
        assert max(errors) < 2e-2  # the others' int8 codes may become their neighbours


@pytest.mark.parametrize("side", [8, 9])
def test_wide_layers_give_each_image_of_a_batch_what_it_gets_alone(wide, side):
    """Scales are an image's own, on odd latents too, and a batch may mix timesteps."""
    both = unet_call(wide, batch=3, side=side)
    patcher = wide.clone()
    patcher.load(torch.device("cpu"), full_load=True)
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(3, 4, side, side, generator=generator), torch.randn(3, 77, 128, generator=generator)
    steps, options = torch.linspace(900, 100, 3), {"transformer_options": {}}
    for i in range(3):
        alone = patcher.model.diffusion_model(x[i : i + 1], steps[i : i + 1], context=context[i : i + 1], y=torch.zeros(1, 1600), **options)
        assert sqnr_db(both[i], alone[0]) > 60


def test_wide_layers_run_in_a_graph_and_give_the_same_picture(model, wide, sample):
    recorder = use_fake_graphs(wide)
    assert torch.equal(sample(wide, steps=4), sample(quantized(model, lambda name: TOKEN16, acceleration=Acceleration.FUSED), steps=4))
    assert len(recorder.recordings) == 1 and state_of(wide).runner.last_reason is None


def test_wide_file_comes_back_bit_for_bit(model, sample, tmp_path):
    patcher = quantized(model, lambda name: TOKEN16 if name.endswith(CONVS) else token_scheme(name))
    save_quantized(patcher, tmp_path / "wide.safetensors")
    loaded = load_quantized(tmp_path / "wide.safetensors").model
    assert torch.equal(sample(loaded), sample(patcher))


def test_lora_runs_beside_wide_layers_and_a_diff_is_merged(wide, sample, add_lora):
    before = sample(wide)
    assert sqnr_db(before, sample(add_lora(wide))) < 30
    assert torch.equal(sample(wide), before)
    for key in (TO_Q, CONV):
        shape = dict(quantized_layers(wide.model))[key].weight.shape
        patched = wide.clone()
        patched.add_patches({key: ("diff", (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.05,))})
        merged = sample(patched)
        assert torch.isfinite(merged).all() and not torch.equal(merged, before)
        assert torch.equal(sample(wide), before)
