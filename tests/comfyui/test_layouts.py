"""int8 weights as QuantizedTensors: what ComfyUI copies, moves and restores must stay whole."""

import comfy.memory_management
import pytest
import torch

from stepquant.errors import LayoutError
from stepquant.hosts.comfy.layouts import Int8Layout, make_weight, unpack
from stepquant.hosts.compute import sums_of_codes
from stepquant.kernels.channel_group import ChannelGroups, channel_groups
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


def _grouped(shape, seed=0, exponents=(4, 1, 0)):
    """As _weight, in three blocks of 16 channels."""
    generator = torch.Generator().manual_seed(seed)
    plain, order = torch.randn(shape, generator=generator), torch.randperm(shape[1], generator=generator).int()
    groups = channel_groups(order, torch.tensor(exponents, dtype=torch.int8), 16)
    quantized = quantize_weight(plain, "layer")
    codes = quantized.codes[..., order.long()].contiguous()
    return plain, groups, make_weight(codes, quantized.scale, True, torch.float32, groups)


def _same_groups(first: ChannelGroups, second: ChannelGroups) -> bool:
    pairs = [(getattr(first, name), getattr(second, name)) for name in vars(first)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("shape", SHAPES)
def test_layout_keeps_channel_groups_and_dequantizes_to_the_models_order(shape):
    plain, groups, weight = _grouped(shape)
    parts = unpack(weight)
    assert _same_groups(parts.groups, groups)
    assert torch.equal(parts.weight_sums, sums_of_codes(parts.qweight, groups))
    quantized = quantize_weight(plain, "layer")
    assert torch.equal(weight.dequantize(), dequantize_weight(quantized.codes, quantized.scale, torch.float32))
    tensors = [value for value in vars(parts.groups).values() if isinstance(value, torch.Tensor)]
    assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


@pytest.mark.parametrize("shape", SHAPES)
def test_requantize_keeps_the_groups(shape):
    plain, groups, weight = _grouped(shape)
    again = weight.requantize_from_float(weight.dequantize(), scale="recalculate")
    assert torch.equal(again._qdata, weight._qdata) and again.params == weight.params
    doubled = weight.requantize_from_float(2 * plain)
    assert _same_groups(unpack(doubled).groups, groups)
    assert torch.allclose(doubled.dequantize(), 2 * weight.dequantize())


def test_channel_groups_survive_moves_copies_and_dynamic_vrams_pages():
    _, groups, weight = _grouped((48, 40))
    for copy in (weight.clone(), weight.detach(), weight.to(torch.float16)):
        assert _same_groups(unpack(copy).groups, groups)
    pages = torch.zeros(comfy.memory_management.vram_aligned_size([weight]), dtype=torch.uint8)
    pages[: weight._qdata.numel()] = weight._qdata.view(torch.uint8)
    (paged,) = comfy.memory_management.interpret_gathered_like([weight], pages)
    assert _same_groups(unpack(paged).groups, groups) and torch.equal(paged.dequantize(), weight.dequantize())


def test_copy_refuses_a_weight_in_other_channel_groups():
    _, _, weight = _grouped((48, 40))
    _, _, other = _grouped((48, 40), exponents=(5, 1, 0))
    with pytest.raises(LayoutError, match="other channel groups"):
        weight.copy_(other)
