"""4-bit weights in ComfyUI: the layout stays whole, sampling uses them, files and LoRAs work as with 8 bits."""

import pytest
import torch
from fused_blocks import unet_call
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from stepquant.hosts.comfy.attach import counting_macs, state_of
from stepquant.hosts.comfy.int4_layout import make_int4_weight
from stepquant.hosts.comfy.layouts import is_quantized, unpack
from stepquant.hosts.comfy.loader import load_quantized
from stepquant.hosts.comfy.lora import quantized_layers
from stepquant.hosts.comfy.quantize import quantize_model
from stepquant.hosts.comfy.save import save_quantized
from stepquant.kernels import dispatch
from stepquant.kernels.int4_expand import int4_expand_ref
from stepquant.kernels.int4_weight import expanded_codes
from stepquant.quant.file_format import QuantizedLayer, read_model
from stepquant.quant.int4 import quantize_int4
from stepquant.quant.sqnr import sqnr_db

TRANSFORMER_BLOCKS = 17
TO_Q = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture
def int4(model):
    return quantize_model(model, "w4a8-token")


def _weight(shape=(48, 192), seed=0, has_sums=True):
    plain = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight = quantize_int4(plain, "layer")
    stored = QuantizedLayer(weight.packed(), weight.scale, group_scale=weight.group_scale)
    return weight, make_int4_weight(stored, has_sums, torch.float32)


def _int4_names(model):
    return {name for name, scheme in state_of(model).recipe.schemes.items() if scheme.is_int4}


def test_int4_layout_dequantizes_to_the_original_order_and_keeps_its_parts_aligned():
    weight, live = _weight()
    assert is_quantized(live)
    assert live.shape == (48, 192)
    assert torch.allclose(live.dequantize(), weight.dequantize())
    parts = unpack(live)
    codes = expanded_codes(parts.qweight, parts.group_scale, 192)
    assert torch.equal(parts.weight_sums, codes.sum(1, dtype=torch.int32))
    assert all(part.data_ptr() % 16 == 0 for part in (parts.qweight, parts.weight_scale, parts.group_scale, parts.weight_sums))


def test_int4_layout_copies_scales_with_codes_and_takes_another_dtype():
    (_, live), (_, backup) = _weight(seed=0), _weight(seed=1)
    parameter = torch.nn.Parameter(live, requires_grad=False)
    unpack(parameter)
    parameter.data.copy_(backup)
    assert torch.equal(parameter.dequantize(), backup.dequantize())
    assert torch.equal(unpack(parameter).group_scale, unpack(backup).group_scale)
    assert backup.to(torch.float16).dequantize().dtype == torch.float16


def test_int4_layout_requantizes_to_the_same_kind_of_weight():
    _, live = _weight()
    again = live.requantize_from_float(live.dequantize(), scale="recalculate", stochastic_rounding=7)
    assert again._qdata.shape == live._qdata.shape
    assert sqnr_db(live.dequantize(), again.dequantize()) > 30


def test_int4_layout_is_as_small_as_its_parts():
    _, live = _weight((320, 640), has_sums=False)
    assert live.nbytes == 320 * 640 // 2 + 4 * 320 + 4 * 320 * 5


def test_w4a8_gives_4_bits_to_the_linears_that_can_have_them_and_samples_as_integers(model, int4, sample):
    names = _int4_names(int4)
    shapes = {
        key.removeprefix("diffusion_model.").removesuffix(".weight"): module.weight.shape for key, module in quantized_layers(int4.model)
    }
    assert names == {name for name, shape in shapes.items() if len(shape) == 2 and shape[1] % 64 == 0}
    assert len(names) > 20
    with counting_macs(int4.model) as counter:
        result = sample(int4)
    assert counter.integer_share() == 1.0
    assert torch.isfinite(result).all()
    assert sqnr_db(sample(model), result) > 3  # random weights amplify


def test_w4a8_blocks_give_what_layers_one_by_one_give(model, sample):
    fused, plain = (quantize_model(model, "w4a8-token", acceleration=kind) for kind in ("auto", "off"))
    assert sqnr_db(sample(plain), sample(fused)) > 15  # norms are rounded once less


def test_w4a8_file_comes_back_bit_for_bit_and_is_small(int4, sample, tmp_path):
    path = tmp_path / "int4.safetensors"
    save_quantized(int4, path)
    assert torch.equal(sample(load_quantized(path).model), sample(int4))
    layers = read_model(path).layers
    for name in _int4_names(int4):
        assert layers[name].qweight.dtype == torch.uint8
        assert layers[name].group_scale.dtype == torch.int8
        assert layers[name].group_scale.shape[0] * 64 == layers[name].weight_shape[1]
    again = tmp_path / "again.safetensors"
    save_quantized(load_quantized(path).model, again)
    first, second = load_file(path), load_file(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_lora_runs_beside_4_bit_weights_and_a_diff_is_merged(model, int4, sample, add_lora):
    before = sample(int4)
    assert sqnr_db(before, sample(add_lora(int4))) < 30
    assert torch.equal(sample(int4), before)
    shape = dict(quantized_layers(int4.model))[TO_Q].weight.shape
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.05
    patched = int4.clone()
    patched.add_patches({TO_Q: ("diff", (delta,))})
    merged = sample(patched)
    assert torch.isfinite(merged).all()
    assert not torch.equal(merged, before)
    assert torch.equal(sample(int4), before)


def test_w4a8_blocks_give_the_same_where_attentions_weights_are_written_out_together(int4, monkeypatch):
    expected, calls = unet_call(int4), []

    def counted(qweights, group_scales, K):
        calls.append(len(qweights))
        return int4_expand_ref(qweights, group_scales, K)

    monkeypatch.setattr(dispatch, "expands_int4", lambda rows, device: True)
    monkeypatch.setattr(dispatch, "int4_expand", counted)
    assert torch.equal(unet_call(int4), expected)
    assert calls == [6] * TRANSFORMER_BLOCKS


class _FloatsMade(TorchDispatchMode):
    """Notes the shapes of float tensors in RAM that anything makes; not of quantized ones, which have no floats."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if type(tensor) is torch.Tensor and tensor.is_floating_point() and tensor.device.type == "cpu":
                self.shapes.add(tuple(tensor.shape))
        return result


def test_loading_a_w4a8_file_never_makes_a_layers_float_weight(int4, tmp_path):
    path = tmp_path / "w4a8.safetensors"
    save_quantized(int4, path)
    stored = read_model(path)
    shapes = {layer.weight_shape for layer in stored.layers.values()} - {tuple(tensor.shape) for tensor in stored.rest.values()}
    assert len(shapes) > 20
    with _FloatsMade() as made:
        loaded = load_quantized(path).model
    assert loaded.model_size() > 0 and made.shapes
    assert not shapes & made.shapes
