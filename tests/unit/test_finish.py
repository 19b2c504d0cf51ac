"""What follows a product: addend, codes instead of floats, two segments. Reference against float64, kernels against the reference."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import LayoutError
from stepquant.kernels import backend, dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.int8_conv2d import border_sums, int8_conv2d_ref
from stepquant.kernels.int8_gemm import int8_gemm_ref

TOLERANCE = 5e-6  # fp32, relative norm to float64


def activation(shape: tuple[int, ...], generator: torch.Generator, scale: float = 0.02) -> QuantizedActivation:
    """Random codes with a scale and a zero point for each image, or for all rows."""
    samples = shape[0] if len(shape) == 4 else 1
    zero_point = torch.randint(-128, 128, (samples,), generator=generator, dtype=torch.int32)
    rows = torch.Size(shape[:-1]).numel()
    q = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    return QuantizedActivation(q, (torch.rand(samples, generator=generator) + 0.5) * scale, zero_point, rows // samples)


def exact(a: QuantizedActivation) -> torch.Tensor:
    """The floats that the codes stand for, in float64."""
    q = a.codes.double().view(a.scale.numel(), -1)
    return ((q - a.zero_point.double()[:, None]) * a.scale.double()[:, None]).view(a.codes.shape)


def gemm_layer(generator: torch.Generator, K: tuple[int, ...] = (48, 33)) -> dict:
    qweight = torch.randint(-128, 128, (40, sum(K)), generator=generator, dtype=torch.int8)
    parts = [part.sum(1, dtype=torch.int32) for part in qweight.split(K, 1)]
    return {
        "activation": activation((24, K[0]), generator),
        "second": activation((24, K[1]), generator, 0.5) if len(K) > 1 else None,
        "qweight": qweight,
        "weight_scale": torch.rand(40, generator=generator) * 0.001 + 0.0001,
        "weight_sum": torch.stack(parts) if len(K) > 1 else parts[0],
        "bias": torch.randn(40, generator=generator),
        "out_dtype": torch.float32,
    }


def conv_layer(generator: torch.Generator, C: tuple[int, ...] = (20, 12)) -> dict:
    qweight = torch.randint(-128, 128, (24, 3, 3, sum(C)), generator=generator, dtype=torch.int8)
    tables = [border_sums(part) for part in qweight.split(C, 3)]
    return {
        "activation": activation((2, 5, 7, C[0]), generator),
        "second": activation((2, 5, 7, C[1]), generator, 0.5) if len(C) > 1 else None,
        "qweight": qweight,
        "weight_scale": torch.rand(24, generator=generator) * 0.001 + 0.0001,
        "border_sums": torch.stack(tables) if len(C) > 1 else tables[0],
        "bias": torch.randn(24, generator=generator),
        "out_dtype": torch.float32,
    }


def float64(layer: dict, stride: int = 1) -> torch.Tensor:
    """The layer on the concatenation of its dequantized inputs."""
    segments = [layer["activation"]] + ([layer["second"]] if layer["second"] else [])
    x = torch.cat([exact(segment) for segment in segments], -1)
    shape = (-1,) + (1,) * (layer["qweight"].ndim - 1)
    weight = layer["qweight"].double() * layer["weight_scale"].double().view(shape)
    bias = layer["bias"].double()
    if x.ndim == 2:
        return x @ weight.t() + bias
    return torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), bias, stride, 1)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().double() - expected.double()).norm() / expected.double().norm())


def moved(value, device):
    if isinstance(value, QuantizedActivation):
        return QuantizedActivation(value.codes.to(device), value.scale.to(device), value.zero_point.to(device), value.rows_per_scale)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def run(operation, layer: dict, device: torch.device):
    """The kernel's result on the device."""
    return operation(**{name: moved(value, device) for name, value in layer.items()})


@pytest.mark.parametrize("K", [(48,), (48, 33)], ids=["one segment", "two segments"])
def test_int8_gemm_adds_a_residual_and_keeps_each_segments_scale(K, generator, triton_device):
    layer = gemm_layer(generator, K)
    layer["addend"] = torch.randn(24, 40, generator=generator)
    expected = float64(layer) + layer["addend"].double()
    assert relative_error(int8_gemm_ref(**layer), expected) <= TOLERANCE
    assert relative_error(run(dispatch.int8_gemm, layer, triton_device), expected) <= TOLERANCE


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("C", [(20,), (20, 12)], ids=["one segment", "two segments"])
def test_int8_conv2d_adds_a_vector_per_image_and_keeps_each_segments_scale(C, stride, generator, triton_device):
    layer = conv_layer(generator, C) | {"stride": stride}
    layer["addend"] = torch.randn(2, 24, generator=generator)
    expected = float64(layer, stride) + layer["addend"].double()[:, :, None, None]
    assert relative_error(int8_conv2d_ref(**layer), expected) <= TOLERANCE
    assert relative_error(run(dispatch.int8_conv2d, layer, triton_device), expected) <= TOLERANCE


def test_int8_conv2d_adds_a_residual_image(generator, triton_device):
    layer = conv_layer(generator, (20,))
    layer["addend"] = torch.randn(2, 24, 5, 7, generator=generator).contiguous(memory_format=torch.channels_last)
    expected = float64(layer) + layer["addend"].double()
    assert relative_error(int8_conv2d_ref(**layer), expected) <= TOLERANCE
    assert relative_error(run(dispatch.int8_conv2d, layer, triton_device), expected) <= TOLERANCE


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("operation", ["gemm", "conv2d"])
def test_int8_products_store_codes_that_dequantize_to_the_result(operation, asymmetric, generator, triton_device):
    layer = gemm_layer(generator) if operation == "gemm" else conv_layer(generator)
    entries = torch.tensor([0.05, 0.08])
    layer |= {"out_scale": entries, "out_zero_point": torch.tensor([-20, 31], dtype=torch.int32) if asymmetric else None}
    expected = float64(layer)
    rows = expected if operation == "gemm" else expected.permute(0, 2, 3, 1)
    reference = (int8_gemm_ref if operation == "gemm" else int8_conv2d_ref)(**layer)
    result = run(dispatch.int8_gemm if operation == "gemm" else dispatch.int8_conv2d, layer, triton_device)
    low = -128 if asymmetric else -127
    by_sample = rows.reshape(2, -1) / entries.double()[:, None]
    zero = layer["out_zero_point"].double()[:, None] if asymmetric else 0
    exact_codes = (by_sample.round() + zero).clamp(low, 127).view(rows.shape)
    for made in (reference, result):
        assert made.codes.dtype == torch.int8 and made.codes.shape == rows.shape
        assert made.rows_per_scale * 2 == made.rows
        apart = (made.codes.cpu().double() - exact_codes).abs()
        assert apart.max() <= 1 and (apart > 0).double().mean() <= 1e-3
    assert (reference.codes == low).any() or (reference.codes == 127).any() or reference.codes.double().std() > 10


@pytest.mark.parametrize("name", ["dequantized", "reference"])
def test_int8_products_finish_alike_on_every_backend(name, generator, monkeypatch):
    gemm, conv = gemm_layer(generator), conv_layer(generator)
    gemm["addend"] = torch.randn(24, 40, generator=generator)
    conv["addend"] = torch.randn(2, 24, generator=generator)
    expected = float64(gemm) + gemm["addend"].double(), float64(conv) + conv["addend"].double()[:, :, None, None]
    monkeypatch.setenv(backend.OVERRIDE, name)
    backend.forget_choices()
    assert relative_error(dispatch.int8_gemm(**gemm), expected[0]) <= TOLERANCE
    assert relative_error(dispatch.int8_conv2d(**conv), expected[1]) <= TOLERANCE
    codes = dispatch.int8_gemm(**gemm, out_scale=torch.tensor([0.05]))
    assert codes.codes.dtype == torch.int8
    backend.forget_choices()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"addend": torch.zeros(24, 41)}, r"addend of shape \(24, 41\)"),
        ({"addend": torch.zeros(7, 40)}, r"contiguous \(24, 40\)"),
        ({"addend": torch.zeros(40, 24).t()}, "strides"),
        ({"out_zero_point": torch.zeros(1, dtype=torch.int32)}, "without out_scale"),
        ({"out_scale": torch.ones(7)}, r"out_scale of shape \(7,\) for 24 rows"),
        ({"weight_sum": torch.zeros(40, dtype=torch.int32)}, r"weight_sum \(2, 40\)"),
    ],
    ids=["N differs", "rows do not divide", "strided", "zero point alone", "scale rows", "sums of one segment"],
)
def test_int8_gemm_refuses_a_finish_that_does_not_fit(change, message, generator):
    with pytest.raises(LayoutError, match=message):
        int8_gemm_ref(**gemm_layer(generator) | change)


def test_int8_conv2d_refuses_segments_of_different_images_and_residuals_in_nchw(generator):
    layer = conv_layer(generator)
    with pytest.raises(LayoutError, match="only the channels may differ"):
        int8_conv2d_ref(**layer | {"second": activation((2, 5, 6, 12), generator)})
    with pytest.raises(LayoutError, match="channels_last"):
        int8_conv2d_ref(**layer | {"addend": torch.zeros(2, 24, 5, 7)})
