"""The file for people without StepQuant: the same codes where ComfyUI's own int8 has a place for them, 16 bit elsewhere."""

import json

import pytest
import torch
from safetensors.torch import load_file

from stepquant.errors import FormatError
from stepquant.quant.file_format import QuantizedLayer, QuantizedModel
from stepquant.quant.int4 import quantize_int4
from stepquant.quant.native_format import native_tensors, write_native
from stepquant.quant.recipe import Recipe
from stepquant.quant.scheme import FP8 as FP8_SCHEME
from stepquant.quant.scheme import ActivationMode, ComputeType, Scheme
from stepquant.quant.sqnr import sqnr_db
from stepquant.quant.weight import FP8, dequantize_weight, quantize_weight

LINEAR, CONV = "middle_block.1.proj_in", "middle_block.0.in_layers.2"


def _model(order: torch.Tensor | None = None, scheme: Scheme | None = None, factor: float = 1.0, **extra) -> QuantizedModel:
    generator = torch.Generator().manual_seed(0)
    linear = quantize_weight(torch.randn(8, 16, generator=generator), LINEAR)
    conv = quantize_weight(torch.randn(8, 4, 3, 3, generator=generator) * factor, CONV)
    codes = linear.codes if order is None else linear.codes.index_select(1, order.long())
    layers = {
        LINEAR: QuantizedLayer(codes, linear.scale, torch.randn(8, generator=generator).half(), channel_order=order),
        CONV: QuantizedLayer(conv.codes, conv.scale),
    }
    schemes = {LINEAR: scheme or Scheme(), CONV: Scheme()}
    return QuantizedModel(layers, {"out.2.weight": torch.ones(4, 8, 3, 3).half()}, Recipe(schemes, "test", "test"), extra=extra)


def test_linears_keep_their_codes_and_scales_in_comfyuis_format(tmp_path):
    model = _model()
    write_native(tmp_path / "native.safetensors", model)
    tensors = load_file(tmp_path / "native.safetensors")
    assert torch.equal(tensors[f"{LINEAR}.weight"], model.layers[LINEAR].qweight)
    assert tensors[f"{LINEAR}.weight_scale"].shape == (8, 1)
    assert torch.equal(tensors[f"{LINEAR}.weight_scale"].flatten(), model.layers[LINEAR].weight_scale)
    assert json.loads(bytes(tensors[f"{LINEAR}.comfy_quant"].tolist())) == {"format": "int8_tensorwise"}
    assert torch.equal(tensors[f"{LINEAR}.bias"], model.layers[LINEAR].bias)


def test_convolutions_become_16_bit_in_the_order_of_a_stock_file():
    model = _model()
    weight = native_tensors(model)[f"{CONV}.weight"]
    layer = model.layers[CONV]
    assert weight.dtype is torch.float16 and weight.shape == (8, 4, 3, 3)
    expected = layer.qweight[3, 1, 2, 0].float() * layer.weight_scale[3]
    assert weight[3, 0, 1, 2].item() == pytest.approx(expected.item(), rel=1e-3)


def test_channel_groups_go_back_to_the_models_order():
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).int()
    plain, grouped = native_tensors(_model()), native_tensors(_model(order))
    assert torch.equal(plain[f"{LINEAR}.weight"], grouped[f"{LINEAR}.weight"])
    assert not any("channel_" in key for key in grouped)


def test_4_bit_linears_become_8_bit_without_a_loss():
    weight = quantize_int4(torch.randn(8, 64, generator=torch.Generator().manual_seed(3)), LINEAR)
    model = _model()
    model.layers[LINEAR] = QuantizedLayer(weight.packed(), weight.scale, group_scale=weight.group_scale)
    tensors = native_tensors(model)
    assert tensors[f"{LINEAR}.weight"].dtype is torch.int8
    dense = tensors[f"{LINEAR}.weight"].float() * tensors[f"{LINEAR}.weight_scale"]
    assert torch.allclose(dense, weight.dequantize(), rtol=1e-6)


def test_layers_that_compute_in_16_bit_say_so():
    scheme = Scheme(activation=ActivationMode.FP16, compute=ComputeType.FP16)
    settings = json.loads(bytes(native_tensors(_model(scheme=scheme))[f"{LINEAR}.comfy_quant"].tolist()))
    assert settings["full_precision_matrix_mult"] is True


def test_names_have_a_prefix_only_in_a_whole_checkpoint():
    assert f"{LINEAR}.weight" in native_tensors(_model(v_pred=torch.zeros(0)))
    whole = native_tensors(_model(**{"first_stage_model.x": torch.zeros(1)}))
    assert f"model.diffusion_model.{LINEAR}.weight" in whole and "model.diffusion_model.out.2.weight" in whole


def test_a_convolution_beyond_16_bit_is_refused_by_name(tmp_path):
    with pytest.raises(FormatError, match=CONV.replace(".", r"\.")):
        write_native(tmp_path / "native.safetensors", _model(factor=1e6))
    assert not list(tmp_path.iterdir())


def test_fp8_linears_become_int8_near_the_same_weight():
    model = _model(scheme=FP8_SCHEME)
    weight = quantize_weight(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), LINEAR, FP8)
    model.layers[LINEAR] = QuantizedLayer(weight.codes, weight.scale, model.layers[LINEAR].bias)
    tensors = native_tensors(model)
    assert tensors[f"{LINEAR}.weight"].dtype is torch.int8
    assert json.loads(bytes(tensors[f"{LINEAR}.comfy_quant"].tolist())) == {"format": "int8_tensorwise"}
    expected = dequantize_weight(weight.codes, weight.scale, torch.float32)
    assert sqnr_db(expected, tensors[f"{LINEAR}.weight"].float() * tensors[f"{LINEAR}.weight_scale"]) > 38
