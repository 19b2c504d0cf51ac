"""fp8_gemm and fp8_conv2d: reference against float64, kernels against the reference, what they refuse."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import LayoutError
from stepquant.kernels import backend, dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.design import Design
from stepquant.kernels.fp8_conv2d import fp8_conv2d_ref
from stepquant.kernels.fp8_gemm import FP8, fp8_gemm_ref
from stepquant.kernels.tables import forced_design

DESIGNS = [Design(64, 64, 32, 4, 2), Design(64, 64, 32, 4, 2, tma=True), Design(64, 64, 32, 4, 2, split_k=2)]


def codes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return (torch.randn(shape, generator=generator) * 30).to(FP8)


def activation(shape: tuple[int, ...], generator: torch.Generator, entries: int) -> QuantizedActivation:
    rows = torch.Size(shape[:-1]).numel()
    return QuantizedActivation(codes(shape, generator), torch.rand(entries, generator=generator) * 0.01 + 0.001, None, rows // entries)


def gemm_layer(generator: torch.Generator, entries: int = 70) -> dict:
    return {
        "activation": activation((70, 96), generator, entries),
        "second": activation((70, 32), generator, 1),
        "qweight": codes((72, 128), generator),
        "weight_scale": torch.rand(72, generator=generator) * 0.001 + 0.0001,
        "bias": torch.randn(72, generator=generator),
        "addend": torch.randn(70, 72, generator=generator),
    }


def conv_layer(generator: torch.Generator) -> dict:
    return {
        "activation": activation((2, 8, 8, 32), generator, 2),
        "second": activation((2, 8, 8, 16), generator, 1),
        "qweight": codes((40, 3, 3, 48), generator),
        "weight_scale": torch.rand(40, generator=generator) * 0.001 + 0.0001,
        "bias": torch.randn(40, generator=generator),
        "addend": torch.randn(2, 40, generator=generator),
    }


def float64(layer: dict, stride: int = 1) -> torch.Tensor:
    segments = [layer[name] for name in ("activation", "second") if layer[name]]
    rows = [a.codes.double() * a.per_row(a.scale).double().view(*a.codes.shape[:-1], 1) for a in segments]
    shape = (-1,) + (1,) * (layer["qweight"].ndim - 1)
    x, weight = torch.cat(rows, -1), layer["qweight"].double() * layer["weight_scale"].double().view(shape)
    if x.ndim == 2:
        return x @ weight.t() + layer["bias"].double() + layer["addend"].double()
    y = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), layer["bias"].double(), stride, 1)
    return y + layer["addend"].double()[:, :, None, None]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().double() - expected.double()).norm() / expected.double().norm())


def moved(value, device):
    if isinstance(value, QuantizedActivation):
        return QuantizedActivation(value.codes.to(device), value.scale.to(device), None, value.rows_per_scale)
    return value.to(device) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("entries", [1, 70], ids=["one scale", "per token"])
def test_fp8_gemm_reference_matches_float64(entries, generator):
    layer = gemm_layer(generator, entries)
    assert relative_error(fp8_gemm_ref(**layer, out_dtype=torch.float32), float64(layer)) <= 5e-6
    assert relative_error(fp8_gemm_ref(**layer), float64(layer)) <= 5e-4


@pytest.mark.parametrize("stride", [1, 2])
def test_fp8_conv2d_reference_matches_float64(stride, generator):
    layer = conv_layer(generator)
    assert relative_error(fp8_conv2d_ref(**layer, stride=stride, out_dtype=torch.float32), float64(layer, stride)) <= 5e-6


@pytest.fixture
def sum_tolerance(triton_device):
    """Hopper's tensor cores sum fp8 products with about 14 bits of mantissa; the interpreter sums in fp32."""
    return 5e-3 if triton_device.type == "cuda" else 5e-6


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.label)
def test_fp8_gemm_kernel_matches_float64(design, generator, triton_device, sum_tolerance):
    layer = gemm_layer(generator)
    with forced_design(design):
        y = dispatch.fp8_gemm(**{name: moved(value, triton_device) for name, value in layer.items()}, out_dtype=torch.float32)
    assert relative_error(y, float64(layer)) <= sum_tolerance


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.label)
def test_fp8_conv2d_kernel_matches_float64(design, generator, triton_device, sum_tolerance):
    layer = conv_layer(generator)
    with forced_design(design):
        y = dispatch.fp8_conv2d(**{name: moved(value, triton_device) for name, value in layer.items()}, out_dtype=torch.float32)
    assert relative_error(y, float64(layer)) <= sum_tolerance


def test_fp8_conv2d_of_one_segment_matches_float64_with_a_rest_of_columns(generator, triton_device, sum_tolerance):
    layer = conv_layer(generator) | {"second": None, "qweight": codes((104, 3, 3, 32), generator)}
    layer |= {name: torch.randn(104, generator=generator) for name in ("weight_scale", "bias")} | {
        "addend": torch.randn(2, 104, generator=generator)
    }
    with forced_design(Design(64, 64, 32, 4, 2, tma=True, rest_n=16)):
        y = dispatch.fp8_conv2d(**{name: moved(value, triton_device) for name, value in layer.items()}, out_dtype=torch.float32)
    assert relative_error(y, float64(layer)) <= sum_tolerance


def test_fp8_products_have_a_dequantized_fallback(generator, monkeypatch):
    gemm, conv = gemm_layer(generator), conv_layer(generator)
    monkeypatch.setenv(backend.OVERRIDE, "dequantized")
    backend.forget_choices()
    assert relative_error(dispatch.fp8_gemm(**gemm, out_dtype=torch.float32), float64(gemm)) <= 5e-6
    assert relative_error(dispatch.fp8_conv2d(**conv, out_dtype=torch.float32), float64(conv)) <= 5e-6
    backend.forget_choices()


def test_fp8_products_refuse_int8_codes_and_zero_points(generator):
    layer = gemm_layer(generator)
    a = layer["activation"]
    with pytest.raises(LayoutError, match="codes are torch.int8"):
        fp8_gemm_ref(**layer | {"activation": QuantizedActivation(a.codes.to(torch.int8), a.scale, None, 1)})
    with pytest.raises(LayoutError, match="Use int8 for an asymmetric layer"):
        fp8_gemm_ref(**layer | {"activation": QuantizedActivation(a.codes, a.scale, torch.zeros(70, dtype=torch.int32), 1)})
    with pytest.raises(LayoutError, match="qweight is torch.int8"):
        fp8_gemm_ref(**layer | {"qweight": layer["qweight"].to(torch.int8)})
