"""fp8 in ComfyUI: sampling uses it, blocks are fused, files, LoRAs, merges and copies work as with int8."""

import copy

import pytest
import torch
from fused_blocks import calls_of, layer_by_layer, producer_calls, unet_call
from safetensors import safe_open

from stepquant.hosts.comfy.attach import counting_macs
from stepquant.hosts.comfy.layouts import make_weight, unpack
from stepquant.hosts.comfy.loader import load_quantized
from stepquant.hosts.comfy.lora import quantized_layers
from stepquant.hosts.comfy.quantize import quantizable_layers, quantize_model
from stepquant.hosts.comfy.save import save_quantized
from stepquant.kernels.dispatch import FP8
from stepquant.quant.recipe import Recipe
from stepquant.quant.scheme import FP8 as FP8_SCHEME
from stepquant.quant.scheme import ActivationMode, ComputeType, Scheme
from stepquant.quant.sqnr import sqnr_db
from stepquant.quant.weight import quantize_weight

TO_Q = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
CONV = "diffusion_model.input_blocks.1.0.in_layers.2.weight"


@pytest.fixture
def fp8(model):
    """Every layer in fp8."""
    return quantize_model(model, Recipe(dict.fromkeys(quantizable_layers(model), FP8_SCHEME), "test", "test"))


def test_fp8_layout_keeps_codes_and_scales_and_requantizes_to_fp8():
    plain = torch.randn(48, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = quantize_weight(plain, "layer", FP8)
    live = make_weight(weight.codes, weight.scale, False, torch.float32)
    assert live.shape == (48, 16, 3, 3)
    assert unpack(live).qweight.dtype is FP8
    assert torch.equal(unpack(live).qweight.float(), weight.codes.float())
    assert sqnr_db(plain, live.dequantize()) > 30
    again = live.requantize_from_float(live.dequantize(), scale="recalculate", stochastic_rounding=7)
    assert unpack(again).qweight.dtype is FP8
    assert torch.allclose(again.dequantize(), live.dequantize(), rtol=1e-5)
    assert live.nbytes == 48 * 16 * 9 + 4 * 48


def test_fp8_model_samples_in_fp8_throughout(model, fp8, sample):
    assert all(unpack(module.weight).qweight.dtype is FP8 for _, module in quantized_layers(fp8.model))
    with counting_macs(fp8.model) as counter:
        result = sample(fp8)
    assert counter.integer_share() == 1.0
    assert torch.isfinite(result).all()
    assert sqnr_db(sample(model), result) > 3  # random weights amplify


def test_fp8_preset_runs_fp8_beside_int8_and_saves_and_loads(model, sample, tmp_path):
    patcher = quantize_model(model, "w8a8-fp8")
    assert {unpack(module.weight).qweight.dtype for _, module in quantized_layers(patcher.model)} == {FP8, torch.int8}
    result = sample(patcher)
    assert sqnr_db(sample(model), result) > 3
    save_quantized(patcher, tmp_path / "preset.safetensors")
    assert torch.equal(sample(load_quantized(tmp_path / "preset.safetensors").model), result)


def test_fp8_blocks_are_fused(model, fp8, relative_error):
    with producer_calls() as calls:
        fused = unet_call(fp8)
    with layer_by_layer(fp8), producer_calls() as none:
        expected = unet_call(fp8)
    assert not none
    assert {"layer_norm_quantize", "group_norm_silu_quantize", "fp8_geglu_gemm"} == set(calls)
    # e4m3 is coarse: a code that becomes its neighbour moves a value by 6 to 12 %, and random weights amplify that.
    assert relative_error(fused, expected) < relative_error(expected, unet_call(model))


@pytest.mark.parametrize("others", ["attn1.to_k", "ff.net.0.proj", "ff.net.2", "to_out.0", "in_layers.2", "proj_in"])
@pytest.mark.parametrize("how", ["int8", "float_compute", "sixteen_bit"])
def test_fp8_layers_run_beside_layers_of_other_schemes(model, relative_error, others, how):
    other = Scheme() if how == "int8" else Scheme(activation=ActivationMode.FP16, compute=ComputeType.FP16)
    schemes = {name: other if name.endswith(others) else FP8_SCHEME for name in quantizable_layers(model)}
    if how == "sixteen_bit":
        schemes = {name: one for name, one in schemes.items() if not name.endswith(others)}
    patcher = quantize_model(model, Recipe(schemes, "test", "test"))
    for kind, same in (("BasicTransformerBlock", 0.05), ("ResBlock", 1e-6)):  # e4m3 by one scale for all rows, or by one for each
        errors = [relative_error(block(*args, **kwargs), output) for block, args, kwargs, output in calls_of(patcher, kind)]
        assert len(errors) == 17
        assert max(errors) < same


def test_fp8_file_comes_back_bit_for_bit(fp8, sample, tmp_path):
    path, again = tmp_path / "fp8.safetensors", tmp_path / "again.safetensors"
    save_quantized(fp8, path)
    loaded = load_quantized(path).model
    assert torch.equal(sample(loaded), sample(fp8))
    save_quantized(loaded, again)
    with safe_open(path, "pt") as first, safe_open(again, "pt") as second:
        assert set(first.keys()) == set(second.keys())
        assert any(first.get_tensor(key).dtype is FP8 for key in first.keys())  # noqa: SIM118
        for key in first.keys():  # noqa: SIM118
            assert torch.equal(first.get_tensor(key).view(torch.uint8), second.get_tensor(key).view(torch.uint8)), key


def test_lora_runs_beside_fp8_layers_and_a_diff_is_merged(fp8, sample, add_lora):
    before = sample(fp8)
    assert sqnr_db(before, sample(add_lora(fp8))) < 30
    assert torch.equal(sample(fp8), before)
    for key in (TO_Q, CONV):
        shape = dict(quantized_layers(fp8.model))[key].weight.shape
        patched = fp8.clone()
        patched.add_patches({key: ("diff", (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.05,))})
        merged = sample(patched)
        assert torch.isfinite(merged).all()
        assert not torch.equal(merged, before)
        assert torch.equal(sample(fp8), before)


def test_a_deep_copy_of_an_fp8_model_gives_the_same(fp8):
    expected = unet_call(fp8)
    unet = fp8.model.diffusion_model
    copied = copy.deepcopy(unet, {id(weight): weight for weight in unet.parameters()})  # QuantizedTensors refuse to be copied
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 128, generator=generator)
    y = copied(x, torch.linspace(900, 100, 2), context=context, y=torch.zeros(2, 1600), transformer_options={})
    assert torch.equal(y, expected)
