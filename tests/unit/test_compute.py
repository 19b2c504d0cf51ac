"""Forward of one quantized layer: the right scale for each row, integers where the scheme says so, float where it must be."""

import pytest
import torch
import torch.nn.functional as F

from stepquant.hosts.compute import LayerTensors, conv2d, linear, sums_of_codes
from stepquant.kernels import dispatch
from stepquant.quant.mac_counter import MacCounter
from stepquant.quant.scheme import ActivationMode, ComputeType, Scheme
from stepquant.quant.sqnr import sqnr_db
from stepquant.quant.weight import dequantize_weight, quantize_weight

MODES = ["fp16", "token", "static", "static_asymmetric"]


def _layer(shape, mode, bias=True, act_scale=None, **kwargs):
    generator = torch.Generator().manual_seed(0)
    weight = quantize_weight(torch.randn(shape, generator=generator), "layer")
    asymmetric = mode == "static_asymmetric"
    activation = ActivationMode("static" if asymmetric else mode)
    tables = {}
    if activation is ActivationMode.STATIC:
        tables["act_scale"] = torch.full((64,), 4 / 127) if act_scale is None else act_scale
    if asymmetric:
        tables["act_zero_point"] = torch.full((64,), -8, dtype=torch.int32)
    return LayerTensors(
        "layer",
        Scheme(activation=activation, symmetric=not asymmetric),
        weight.codes,
        weight.scale,
        torch.randn(shape[0], generator=generator) if bias else None,
        sums_of_codes(weight.codes) if asymmetric else None,
        **tables,
        **kwargs,
    )


def _input(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _float(layer):
    return dequantize_weight(layer.qweight, layer.weight_scale, torch.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(2, 77, 64), (2, 64), (2, 5, 7, 64)], ids=str)
def test_linear_is_near_the_float_layer(mode, shape):
    layer, x = _layer((48, 64), mode), _input(*shape)
    y = linear(x, layer, torch.tensor([3, 40]))
    assert y.shape == (*shape[:-1], 48) and y.dtype == x.dtype
    assert sqnr_db(F.linear(x, _float(layer), layer.bias), y) > 35


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1), (1, 2)])
def test_conv_is_near_the_float_layer(mode, kernel, stride):
    layer, x = _layer((24, 32, kernel, kernel), mode), _input(2, 32, 9, 11)
    y = conv2d(x, layer, torch.tensor([3, 40]), stride, kernel // 2)
    expected = F.conv2d(x, _float(layer), layer.bias, stride, kernel // 2)
    assert y.shape == expected.shape
    assert sqnr_db(expected, y) > 35


@pytest.mark.parametrize("operation", ["linear", "conv3x3", "conv1x1"])
def test_each_sample_is_quantized_with_its_own_bucket(operation):
    scale = torch.full((64,), 4 / 127)
    scale[40] = 0.5  # so coarse that it shows
    shape = {"linear": (48, 32), "conv3x3": (48, 32, 3, 3), "conv1x1": (48, 32, 1, 1)}[operation]
    layer = _layer(shape, "static", act_scale=scale)
    x = _input(2, 10, 32) if operation == "linear" else _input(2, 32, 6, 6)

    def run(x, bucket):
        bucket = torch.tensor(bucket)
        return linear(x, layer, bucket) if operation == "linear" else conv2d(x, layer, bucket, 1, len(shape) // 4 * (shape[-1] // 2))

    both = run(x, [3, 40])
    assert torch.equal(both[:1], run(x[:1], [3])) and torch.equal(both[1:], run(x[1:], [40]))
    assert not torch.equal(both[1:], run(x[1:], [3]))


def test_one_bucket_serves_any_batch():
    layer, x = _layer((48, 64), "static"), _input(3, 10, 64)
    assert torch.equal(linear(x, layer, torch.tensor([7])), linear(x, layer, torch.tensor([7, 7, 7])))


@pytest.mark.parametrize("mode", ["static", "static_asymmetric"])
def test_rows_that_the_batch_does_not_divide_are_quantized_per_token(mode):
    layer, x = _layer((48, 64), mode), _input(7, 64)
    token = dispatch.int8_gemm(dispatch.quantize_token(x), layer.qweight, layer.weight_scale, None, layer.bias, torch.float32)
    assert torch.equal(linear(x, layer, torch.tensor([3, 40])), token)


def test_images_that_the_batch_does_not_divide_are_quantized_per_image():
    layer, x = _layer((24, 32, 3, 3), "static"), _input(3, 32, 8, 8)
    image = dispatch.int8_conv2d(dispatch.quantize_image(x), layer.qweight, layer.weight_scale, None, layer.bias, 1, 1, torch.float32)
    assert torch.equal(conv2d(x, layer, torch.tensor([3, 40]), 1, 1), image)


def test_conv1x1_quantizes_each_pixel_for_itself():
    layer, x = _layer((24, 32, 1, 1), "token"), _input(1, 32, 4, 4)
    x[:, :, 0, 0] *= 1000  # an outlier pixel must not cost the others their resolution
    y, expected = conv2d(x, layer, torch.tensor([0]), 1, 0), F.conv2d(x, _float(layer), layer.bias)
    assert sqnr_db(expected[:, :, 1:], y[:, :, 1:]) > 35


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_conv_takes_both_layouts_and_leaves_its_input_unchanged(layout):
    layer, x = _layer((24, 32, 3, 3), "token"), _input(2, 32, 8, 8)
    given = x.contiguous(memory_format=layout)
    before = given.clone()
    assert torch.equal(conv2d(given, layer, torch.tensor([0]), 1, 1), conv2d(x, layer, torch.tensor([0]), 1, 1))
    assert torch.equal(given, before)


def test_counter_tells_integers_from_floats():
    counter = MacCounter()
    x, bucket = _input(2, 10, 64), torch.tensor([0])
    linear(x, _layer((48, 64), "token", counter=counter), bucket)
    assert counter.total == 2 * 10 * 48 * 64 and counter.integer_share() == 1.0
    linear(x, _layer((48, 64), "fp16", counter=counter), bucket)
    assert counter.integer_share() == 0.5


def test_counter_counts_no_integers_where_the_backend_has_none(monkeypatch):
    monkeypatch.setenv("STEPQUANT_BACKEND", "dequantized")
    dispatch.forget_choices()
    try:
        counter = MacCounter()
        conv2d(_input(1, 32, 8, 8), _layer((24, 32, 3, 3), "token", counter=counter), torch.tensor([0]), 2, 1)
        assert counter.total == 4 * 4 * 24 * 32 * 9 and counter.integer_share() == 0.0
    finally:
        monkeypatch.undo()
        dispatch.forget_choices()


def test_float_compute_keeps_a_static_layers_input_float():
    layer = _layer((48, 64), "static")
    layer.scheme = Scheme(activation=ActivationMode.STATIC, compute=ComputeType.FP16)
    x = _input(2, 10, 64)
    assert torch.allclose(linear(x, layer, torch.tensor([0])), F.linear(x, _float(layer), layer.bias), atol=1e-5)


def test_sums_of_codes_match_the_codes():
    for shape in ((24, 32), (24, 32, 1, 1), (24, 32, 3, 3)):
        codes = quantize_weight(_input(*shape), "layer").codes
        plain = codes.flatten(1).sum(1, dtype=torch.int32)
        assert torch.equal(sums_of_codes(codes).view(-1, 24)[0], plain)
