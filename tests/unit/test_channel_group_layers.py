"""Layers with channel groups in the hosts and in files: the float layer's result, original order, exact round trip, damage."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from stepquant.errors import CalibrationError, FormatError, SchemeError
from stepquant.hosts.compute import LayerTensors, conv2d, linear, sums_of_codes
from stepquant.hosts.quantize_layer import check_calibrated, quantize_layer
from stepquant.kernels import backend, dispatch
from stepquant.quant.calibration import Calibration
from stepquant.quant.file_format import QuantizedModel, read_model, write_model
from stepquant.quant.mac_counter import MacCounter
from stepquant.quant.observer import LayerObserver
from stepquant.quant.recipe import Recipe
from stepquant.quant.scheme import ActivationMode, ComputeType, Scheme
from stepquant.quant.sqnr import sqnr_db
from stepquant.quant.timestep import uniform_groups
from stepquant.quant.weight import dequantize_weight, quantize_weight

LINEAR, CONV = "middle_block.1.transformer_blocks.0.ff.net.2", "middle_block.0.in_layers.2"
BASES = [ActivationMode.TOKEN, ActivationMode.STATIC]
SHAPES = {LINEAR: (48, 160), CONV: (24, 96, 3, 3)}
BUCKETS = torch.tensor([3, 40])


def scheme(base: ActivationMode, symmetric: bool = False, granularity: int = 16, **changes) -> Scheme:
    symmetric = symmetric or base is ActivationMode.TOKEN
    fields = {"channel_groups": 4, "granularity": granularity, "group_base": base}
    return Scheme(activation=ActivationMode.CHANNEL_GROUP, symmetric=symmetric, **fields | changes)


def weight_of(name: str) -> torch.Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(3))


def inputs(name: str, seed: int = 1) -> torch.Tensor:
    """SiLU outputs with two channels 50 times larger; (2, 77, K) or (2, C, 9, 11)."""
    K = SHAPES[name][1]
    x = F.silu(torch.randn(2, 99, K, generator=torch.Generator().manual_seed(seed)))
    x[..., 7] *= 50
    x[..., K - 3] *= 50
    return x if name == LINEAR else x.view(2, 9, 11, K).permute(0, 3, 1, 2)


def calibration(name: str) -> Calibration:
    observer = LayerObserver(SHAPES[name][1])
    for seed in range(5):
        x = inputs(name, seed)
        observer.update(x if x.ndim == 3 else x.flatten(2).transpose(1, 2), BUCKETS.tolist())
    return Calibration({name: observer.statistics()})


def quantized(name: str, one: Scheme):
    return quantize_layer(name, weight_of(name), torch.ones(SHAPES[name][0]), one, uniform_groups(2), calibration(name))


def tensors_of(name: str, one: Scheme, **changes) -> LayerTensors:
    stored = quantized(name, one)
    groups = dispatch.channel_groups(stored.channel_order, stored.channel_exponents, one.granularity)
    sums = None if stored.act_zero_point is None else sums_of_codes(stored.qweight, groups)
    tables = {"act_scale": stored.act_scale, "act_zero_point": stored.act_zero_point}
    return LayerTensors(name, one, stored.qweight, stored.weight_scale, stored.bias, sums, groups=groups, **tables | changes)


def run(x: torch.Tensor, layer: LayerTensors, bucket: torch.Tensor = BUCKETS) -> torch.Tensor:
    return conv2d(x, layer, bucket, 1, 1) if x.ndim == 4 else linear(x, layer, bucket)


def run_float(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    bias = torch.ones(weight.shape[0])
    return F.conv2d(x, weight, bias, padding=1) if x.ndim == 4 else F.linear(x, weight, bias)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.value)
@pytest.mark.parametrize("name", SHAPES)
def test_grouped_layer_is_near_the_float_layer_where_one_scale_is_not(name, base):
    x, expected = inputs(name), run_float(inputs(name), weight_of(name))
    grouped = sqnr_db(expected, run(x, tensors_of(name, scheme(base))))
    plain = quantize_weight(weight_of(name), name)
    alone = sqnr_db(expected, run(x, LayerTensors(name, Scheme(), plain.codes, plain.scale, torch.ones(SHAPES[name][0]))))
    # The outlier channels, three quarters of the output's energy, are rounded as finely as before; all others more finely. Stored
    # ranges have headroom, which costs up to 3.5 dB of it.
    floor, gain = (32, 3) if base is ActivationMode.TOKEN else (28.5, -0.5)
    assert grouped > floor and grouped > alone + gain


@pytest.mark.parametrize("granularity", [16, 64], ids=["reference", "kernels"])
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.value)
@pytest.mark.parametrize("name", SHAPES)
def test_grouped_layer_gives_the_same_result_on_the_kernels(name, base, granularity, triton_device, monkeypatch):
    layer = tensors_of(name, scheme(base, granularity=granularity, channel_groups=2))
    y = run(inputs(name), layer)
    monkeypatch.setenv(backend.OVERRIDE, "reference")
    backend.forget_choices()
    torch.testing.assert_close(y, run(inputs(name), layer), rtol=1e-5, atol=1e-5)


def test_grouped_layer_reads_every_samples_own_bucket():
    layer = tensors_of(LINEAR, scheme(ActivationMode.STATIC))
    layer.act_scale = layer.act_scale.clone()
    layer.act_scale[40] *= 8
    x = inputs(LINEAR)
    both = linear(x, layer, BUCKETS)
    assert torch.equal(both[0], linear(x[:1], layer, torch.tensor([3]))[0])
    assert torch.equal(both[1], linear(x[1:], layer, torch.tensor([40]))[0])


def test_grouped_layer_keeps_its_groups_but_scales_by_token_when_rows_fit_no_bucket():
    layer = tensors_of(LINEAR, scheme(ActivationMode.STATIC))
    x = inputs(LINEAR)[0, :33]
    y = linear(x, layer, BUCKETS)
    assert sqnr_db(run_float(x, weight_of(LINEAR)), y) > 34


@pytest.mark.parametrize("name", SHAPES)
def test_grouped_layer_dequantizes_to_the_models_order_and_shape(name):
    stored, weight = quantized(name, scheme(ActivationMode.TOKEN)), weight_of(name)
    assert not torch.equal(stored.channel_order, torch.arange(SHAPES[name][1]).int())
    back = dequantize_weight(stored.qweight, stored.weight_scale, torch.float32, stored.channel_order)
    plain = quantize_weight(weight, name)
    assert torch.equal(back, dequantize_weight(plain.codes, plain.scale, torch.float32))


@pytest.mark.parametrize("name", SHAPES)
def test_grouped_layer_in_float_compute_uses_the_models_order(name):
    layer = tensors_of(name, scheme(ActivationMode.STATIC, compute=ComputeType.FP16))
    assert sqnr_db(run_float(inputs(name), weight_of(name)), run(inputs(name), layer)) > 40


def test_grouped_layer_counts_its_integer_multiply_adds():
    counter = MacCounter()
    run(inputs(CONV), tensors_of(CONV, scheme(ActivationMode.STATIC), counter=counter))
    assert counter.integer_share() == 1.0


def test_quantize_layer_refuses_more_groups_than_channels_make():
    with pytest.raises(SchemeError, match=f"{LINEAR}: 4 channel groups of 64 channels or more need 193 input channels, it has 160"):
        quantized(LINEAR, scheme(ActivationMode.STATIC, granularity=64))


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.value)
def test_grouped_layers_need_a_calibration(base):
    recipe = Recipe({LINEAR: scheme(base)}, "test", "test")
    with pytest.raises(CalibrationError):
        check_calibrated(recipe, None)
    with pytest.raises(CalibrationError, match=LINEAR):
        check_calibrated(recipe, Calibration({}))


def written(path, base: ActivationMode = ActivationMode.STATIC):
    schemes = {name: scheme(base) for name in SHAPES}
    layers = {name: quantized(name, one) for name, one in schemes.items()}
    write_model(path, QuantizedModel(layers, {}, Recipe(schemes, "test", "test")), "0.1.0")
    return layers


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.value)
def test_file_returns_grouped_layers_bit_for_bit(tmp_path, base):
    path = tmp_path / "grouped.safetensors"
    layers = written(path, base)
    loaded = read_model(path)
    for name, layer in layers.items():
        for part, tensor in vars(layer).items():
            other = getattr(loaded.layers[name], part)
            assert other is None if tensor is None else torch.equal(tensor, other), (name, part)
    assert loaded.recipe.schemes[LINEAR] == scheme(base)


def damaged_order(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"model.diffusion_model.{LINEAR}.channel_order"][0] = 5


def missing_exponents(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"model.diffusion_model.{LINEAR}.channel_exponents"]


def ascending_exponents(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"model.diffusion_model.{LINEAR}.channel_exponents"][-1] = 3


@pytest.mark.parametrize("damage", [damaged_order, missing_exponents, ascending_exponents])
def test_file_names_the_layer_when_its_groups_are_damaged(tmp_path, damage):
    path = tmp_path / "grouped.safetensors"
    written(path)
    with safe_open(str(path), "pt") as file:
        tensors, metadata = {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata()  # noqa: SIM118
    assert json.loads(metadata["stepquant"])["recipe"]["schemes"][LINEAR]["granularity"] == 16
    damage(tensors)
    save_file(tensors, str(path), metadata=metadata)
    with pytest.raises(FormatError, match=rf"grouped\.safetensors: {LINEAR}: channel_order must be a permutation of 160 channels"):
        read_model(path)


def test_file_refuses_groups_that_its_scheme_has_not(tmp_path):
    path = tmp_path / "grouped.safetensors"
    schemes = {LINEAR: scheme(ActivationMode.STATIC)}
    write_model(path, QuantizedModel({LINEAR: quantized(LINEAR, schemes[LINEAR])}, {}, Recipe({LINEAR: Scheme()}, "test", "test")), "0.1.0")
    with pytest.raises(FormatError, match=f"{LINEAR}: it has channel groups, which its scheme has not"):
        read_model(path)
