"""4-bit weights in files, in the engine-neutral forward and in the diffusers engine; Hessians gathered from a running pipeline."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepquant.errors import CalibrationError, FormatError, SchemeError
from stepquant.hosts import compute, fused
from stepquant.kernels import dispatch
from stepquant.quant.file_format import HEADER_KEY, QuantizedLayer, QuantizedModel, read_model, write_model
from stepquant.quant.int4 import Int4Weight, quantize_int4
from stepquant.quant.layers import find_layers
from stepquant.quant.mac_counter import MacCounter
from stepquant.quant.native_format import native_tensors
from stepquant.quant.recipe import Recipe, preset_recipe
from stepquant.quant.scheme import ActivationMode, ComputeType, Scheme
from stepquant.quant.sqnr import sqnr_db

LINEAR = "middle_block.1.proj_in"
BUCKET = torch.zeros(1, dtype=torch.int64)


def _weight(N: int = 48, K: int = 192) -> Int4Weight:
    return quantize_int4(torch.randn(N, K, generator=torch.Generator().manual_seed(0)), LINEAR)


def _stored(weight: Int4Weight) -> QuantizedLayer:
    return QuantizedLayer(weight.packed(), weight.scale, group_scale=weight.group_scale)


def _tensors(weight: Int4Weight, scheme: Scheme | None = None, **parts: object) -> compute.LayerTensors:
    paired = dispatch.paired_scales(weight.group_scale)
    sums = compute.sums_of_codes(weight.packed(), group_scale=paired)
    bias = torch.randn(weight.scale.shape[0], generator=torch.Generator().manual_seed(5))
    parts = {"bias": bias, "weight_sums": sums, "group_scale": paired} | parts
    return compute.LayerTensors(LINEAR, scheme or Scheme(weight_bits=4), weight.packed(), weight.scale, **parts)


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("K", [64, 192])
def test_layers_whose_4_bit_weights_were_written_out_give_the_same_products(K, monkeypatch):
    layers, rows = [_tensors(_weight(K=K)), _tensors(_weight(K=K), bias=None)], dispatch.quantize_token(_x(9, K))
    assert fused.written_out(layers, 9, K) is None  # the CPU has no such kernels
    monkeypatch.setattr(dispatch, "expands_int4", lambda rows, device: rows == 9)
    for layer, written in zip(layers, fused.written_out(layers, 9, K), strict=True):
        assert written.qweight.dtype is torch.int8 and written.group_scale is None
        assert torch.equal(fused.product(rows, layer, torch.float32), fused.product(rows, written, torch.float32))


@pytest.mark.parametrize("K", [64, 192, 256])
def test_linear_with_4_bit_weights_is_the_float_layer_up_to_its_input_codes(K):
    weight, x = _weight(K=K), _x(2, 9, K)
    layer = _tensors(weight)
    expected = torch.nn.functional.linear(x, weight.dequantize(), layer.bias)
    assert sqnr_db(expected, compute.linear(x, layer, BUCKET)) > 38


def test_linear_with_4_bit_weights_takes_static_scales_with_a_zero_point():
    weight, x = _weight(), _x(2, 9, 192).abs()
    tables = {"act_scale": torch.full((64,), 5 / 255), "act_zero_point": torch.full((64,), -128, dtype=torch.int32)}
    layer = _tensors(weight, Scheme(weight_bits=4, activation=ActivationMode.STATIC, symmetric=False), **tables)
    expected = torch.nn.functional.linear(x, weight.dequantize(), layer.bias)
    assert sqnr_db(expected, compute.linear(x, layer, BUCKET)) > 35


@pytest.mark.parametrize("scheme", [{"activation": ActivationMode.FP16}, {"compute": ComputeType.FP16}], ids=["fp16 input", "fp16 compute"])
def test_linear_with_4_bit_weights_keeps_a_16_bit_input_exact(scheme):
    weight, x = _weight(), _x(2, 9, 192)
    layer = _tensors(weight, Scheme(weight_bits=4, **scheme))
    expected = torch.nn.functional.linear(x, weight.dequantize(), layer.bias)
    assert torch.allclose(compute.linear(x, layer, BUCKET), expected, atol=1e-4)


def test_multiply_adds_of_4_bit_weights_are_those_of_the_float_layer():
    counter = MacCounter()
    compute.linear(_x(2, 9, 192), _tensors(_weight(), counter=counter), BUCKET)
    assert counter.total_by_layer == {LINEAR: 18 * 192 * 48}
    assert counter.integer_share() == 1


def test_fused_products_of_4_bit_weights_equal_the_layer_itself():
    weight, x = _weight(), _x(18, 192)
    layer, residual = _tensors(weight), _x(18, 48)
    codes = fused.quantize(x, None)
    y = compute.linear(x, layer, BUCKET)
    assert torch.equal(fused.product(codes, layer, torch.float32), y)
    assert torch.allclose(fused.product(codes, layer, torch.float32, residual), y + residual, atol=1e-6)
    assert all(torch.equal(one, y) for one in fused.products(codes, [layer, layer], torch.float32))
    gated = fused.gated_product(codes, layer, torch.float32, None)
    assert torch.equal(gated.codes, fused.geglu(y, None).codes)


def test_w4a8_preset_gives_4_bits_to_linears_with_whole_groups_only():
    shapes = {
        f"{LINEAR}.weight": (48, 192),
        "middle_block.1.proj_out.weight": (48, 200),
        "middle_block.0.in_layers.2.weight": (8, 64, 3, 3),
    }
    schemes = preset_recipe("w4a8-token", find_layers(shapes)).schemes
    assert [scheme.weight_bits for scheme in schemes.values()] == [4, 8, 8]
    assert not preset_recipe("w4a8-token", find_layers(shapes)).needs_calibration
    with pytest.raises(SchemeError, match="w4a8-token: layers without shapes"):
        preset_recipe("w4a8-token", [LINEAR])


def test_mixed_preset_leaves_8_bits_to_what_4_cost_most():
    kept = {f"{LINEAR}.weight": (64, 64), "middle_block.1.proj_out.weight": (64, 64), "middle_block.0.emb_layers.1.weight": (64, 64)}
    shapes = kept | {"middle_block.1.transformer_blocks.0.ff.net.2.weight": (64, 256)}
    layers = find_layers(shapes)
    bits = [scheme.weight_bits for scheme in preset_recipe("w4a8-mixed", layers).schemes.values()]
    assert bits == [8, 8, 8, 4]
    assert [scheme.weight_bits for scheme in preset_recipe("w4a8-token", layers).schemes.values()] == [4, 4, 4, 4]
    with pytest.raises(SchemeError, match="w4a8-mixed: layers without shapes"):
        preset_recipe("w4a8-mixed", list(layers))


def test_scheme_refuses_4_bit_weights_in_channel_groups():
    data = {"weight_bits": 4, "activation": "channel_group"}
    with pytest.raises(SchemeError, match=f"{LINEAR}: 4-bit weights with channel groups"):
        Scheme.from_json(data, LINEAR)
    assert Scheme.from_json(Scheme(weight_bits=4).to_json(), LINEAR) == Scheme(weight_bits=4)


def _written(path, **parts):
    layer = _stored(_weight())
    for part, tensor in parts.items():
        setattr(layer, part, tensor)
    recipe = Recipe({LINEAR: Scheme(weight_bits=4)}, "w4a8-token", "test")
    write_model(path, QuantizedModel({LINEAR: layer}, {}, recipe), "0.1.0")
    return path


def test_file_holds_4_bit_layers_as_they_are(tmp_path):
    layer = read_model(_written(tmp_path / "m.safetensors")).layers[LINEAR]
    assert layer.weight_shape == (48, 192)
    assert torch.equal(layer.qweight, _weight().packed())
    assert torch.equal(layer.group_scale, _weight().group_scale)


@pytest.mark.parametrize(
    "parts",
    [
        {"group_scale": None},
        {"group_scale": torch.ones(4, 48, dtype=torch.int8).repeat(2, 1)},
        {"group_scale": torch.full((3, 48), 100, dtype=torch.int8)},
        {"qweight": torch.zeros(48, 192, dtype=torch.int8)},
    ],
    ids=["no scales", "other K", "products past int8", "8 bits"],
)
def test_load_names_file_and_layer_when_4_bit_parts_do_not_fit(parts, tmp_path):
    path = _written(tmp_path / "m.safetensors", **parts)
    with pytest.raises(FormatError, match=rf"m\.safetensors: {LINEAR}: a 4-bit qweight must be uint8"):
        read_model(path)


def test_load_refuses_group_scales_of_an_8_bit_scheme(tmp_path):
    path = _written(tmp_path / "m.safetensors")
    tensors = load_file(path)
    header = {"version": 1, "recipe": Recipe({LINEAR: Scheme()}, "w8a8-token", "test").to_json()}
    save_file(tensors, str(path), metadata={HEADER_KEY: json.dumps(header)})
    with pytest.raises(FormatError, match="its scheme has 8 bits"):
        read_model(path)


def test_native_export_holds_4_bit_linears_exactly_as_8_bit_ones():
    weight = _weight()
    model = QuantizedModel({LINEAR: _stored(weight)}, {}, Recipe({LINEAR: Scheme(weight_bits=4)}, "w4a8-token", "test"))
    tensors = native_tensors(model)
    restored = tensors[f"{LINEAR}.weight"].float() * tensors[f"{LINEAR}.weight_scale"]
    assert tensors[f"{LINEAR}.weight"].dtype == torch.int8
    assert torch.allclose(restored, weight.dequantize(), rtol=1e-6)


@pytest.fixture(scope="module")
def pipeline():
    pytest.importorskip("diffusers", reason="the embedded engine needs diffusers (stepquant[demo])")
    from stepquant.demo.pipeline import load_demo_pipeline

    return load_demo_pipeline()


PROMPTS = ("3d render of a teddy bear", "flat icon of a cactus, pink background")


def _quick():
    from stepquant.hosts.diffusers.trajectory import Sampling

    return Sampling(steps=2, guidance=4.0, seed=3)


def test_diffusers_engine_saves_and_loads_4_bit_weights_bit_for_bit(pipeline, tmp_path):
    from stepquant.hosts.diffusers.quantize import quantize_unet, quantized_layers, unet_shapes
    from stepquant.hosts.diffusers.trajectory import sample_latents, unet_in_place
    from stepquant.hosts.diffusers.unet_file import load, save

    recipe = preset_recipe("w4a8-token", find_layers(unet_shapes(pipeline.unet)))
    quantized = quantize_unet(copy.deepcopy(pipeline.unet), recipe)
    assert sum(layer.group_scale is not None for layer in quantized_layers(quantized).values()) > 200
    save(quantized, tmp_path / "int4.safetensors")
    again = load(copy.deepcopy(pipeline.unet), tmp_path / "int4.safetensors")
    latents = []
    for unet in (quantized, again):
        with unet_in_place(pipeline, unet):
            latents.append(sample_latents(pipeline, PROMPTS[:1], _quick(), 1))
    assert torch.equal(*latents)


def test_hessians_are_gathered_in_parts_resumed_and_leave_nothing_behind(pipeline, tmp_path):
    from stepquant.hosts.diffusers.hessians import gather_hessians, hessian_cost, hessian_layers
    from stepquant.quant.rounding.hessian import readers

    layers = hessian_layers(pipeline.unet)
    budget = 4 * 512**2 + 1  # a part for each feed-forward, many others together
    cost = hessian_cost(layers, 1, _quick(), 2, budget)
    assert cost.inputs == len(readers(layers)) and cost.runs > 10 and cost.unet_calls == 2 * cost.runs
    with pytest.raises(KeyboardInterrupt):
        gather_hessians(pipeline, PROMPTS[:1], tmp_path, _quick(), progress=_cancel)
    assert not any(module._forward_pre_hooks for module in pipeline.unet.modules())
    seen = []
    files = gather_hessians(pipeline, PROMPTS[:1], tmp_path, _quick(), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2, 2)
    matrix = files.read("middle_block.1.transformer_blocks.0.ff.net.2")
    assert torch.equal(matrix, matrix.t()) and bool((matrix.diagonal() > 0).all())
    seen.clear()
    gather_hessians(pipeline, PROMPTS[:1], tmp_path, _quick(), progress=lambda done, total: seen.append(done))
    assert not seen  # everything is there already
    with pytest.raises(CalibrationError, match="gathered with other settings"):
        gather_hessians(pipeline, PROMPTS[1:], tmp_path, _quick())
    with pytest.raises(CalibrationError, match="no prompts"):
        gather_hessians(pipeline, [], tmp_path)


def test_hessians_observed_along_with_another_run_are_those_of_that_run(pipeline, tmp_path):
    from stepquant.hosts.diffusers.hessians import gather_hessians, hessians_observed
    from stepquant.hosts.diffusers.trajectory import sample_latents

    with hessians_observed(pipeline.unet) as hessian:
        sample_latents(pipeline, PROMPTS[:1], _quick(), 2)
    assert not any(module._forward_pre_hooks for module in pipeline.unet.modules())
    layer = "middle_block.1.transformer_blocks.0.attn1.to_k"
    assert torch.allclose(hessian(layer), gather_hessians(pipeline, PROMPTS[:1], tmp_path, _quick()).read(layer), rtol=1e-4)


def _cancel(done, total):
    raise KeyboardInterrupt
