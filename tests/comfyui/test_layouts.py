"""int8 weights as QuantizedTensors: what ComfyUI copies, moves and restores must stay whole."""

import pytest
import torch

from stepquant.hosts.comfy.layouts import Int8Layout, make_weight, unpack
from stepquant.quant.weight import dequantize_weight, quantize_weight

SHAPES = [pytest.param((48, 40), id="linear"), pytest.param((24, 20, 3, 3), id="conv3x3"), pytest.param((24, 20, 1, 1), id="conv1x1")]


def _weight(shape, seed=0, has_sums=True):
    plain = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    quantized = quantize_weight(plain, "layer")
    return plain, quantized, make_weight(quantized.codes, quantized.scale, has_sums, torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_layout_dequantizes_to_the_original_order(shape):
    plain, quantized, weight = _weight(shape)
    assert weight.shape == plain.shape
    assert torch.equal(weight.dequantize(), dequantize_weight(quantized.codes, quantized.scale, torch.float32))
    assert (weight.dequantize() - plain).abs().max() < plain.abs().max() / 127


@pytest.mark.parametrize("shape", SHAPES)
def test_layout_keeps_codes_scales_and_sums(shape):
    _, quantized, weight = _weight(shape)
    parts = unpack(weight)
    assert torch.equal(parts.qweight, quantized.codes) and torch.equal(parts.weight_scale, quantized.scale)
    assert torch.equal(parts.weight_sums.view(-1, shape[0])[0], quantized.codes.flatten(1).sum(1, dtype=torch.int32))
    assert parts.qweight.data_ptr() % 16 == parts.weight_scale.data_ptr() % 16 == parts.weight_sums.data_ptr() % 16 == 0


def test_copy_into_a_live_weight_brings_the_scale_too():
    # How ComfyUI restores: utils.copy_to_param(model, key, backup) is parameter.data.copy_(backup).
    _, _, live = _weight((48, 40), seed=0)
    _, _, backup = _weight((48, 40), seed=1)
    parameter = torch.nn.Parameter(live, requires_grad=False)
    unpack(parameter)
    parameter.data.copy_(backup)
    assert torch.equal(parameter.dequantize(), backup.dequantize())
    assert torch.equal(unpack(parameter).weight_scale, unpack(backup).weight_scale)


def test_requantize_of_the_dequantized_weight_gives_the_same_codes():
    _, _, weight = _weight((24, 20, 3, 3))
    again = weight.requantize_from_float(weight.dequantize(), scale="recalculate", stochastic_rounding=7)
    assert torch.equal(unpack(again).qweight, unpack(weight).qweight)
    assert again._qdata.shape == weight._qdata.shape  # it can be copied into the place of the old one


def test_weight_changes_dtype_without_touching_codes():
    _, _, weight = _weight((48, 40))
    half = weight.to(torch.float16)
    assert half.dtype == torch.float16 and half.dequantize().dtype == torch.float16
    assert torch.equal(unpack(half).qweight, unpack(weight).qweight)


def test_clone_is_independent():
    _, _, weight = _weight((48, 40))
    before = weight.dequantize()
    weight.clone()._qdata.zero_()
    assert torch.equal(weight.dequantize(), before)


def test_buffer_is_as_small_as_its_parts():
    plain, _, weight = _weight((320, 320), has_sums=False)
    assert weight.nbytes <= plain.numel() + 4 * 320 + 32
    assert weight.params == Int8Layout.Params(torch.float32, (320, 320), False)
