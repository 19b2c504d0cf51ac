"""int8_geglu_gemm: the reference against float64, the kernel against the reference, whatever the design and the shape."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from stepquant.errors import LayoutError
from stepquant.kernels import backend, dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.design import Design
from stepquant.kernels.int8_geglu_gemm import int8_geglu_gemm_ref
from stepquant.kernels.static_scale import StaticScale
from stepquant.kernels.tables import forced_design

DESIGNS = {
    "pointers": Design(64, 64, 32, 4, 2),
    "descriptors": Design(64, 64, 32, 4, 2, tma=True),
    "halves": Design(64, 128, 32, 1, 2, tma=True),
    "split and persistent are left out": Design(64, 64, 32, 4, 2, split_k=2),
}


def layer(M: int, N: int, K: int, generator: torch.Generator, asymmetric: bool = True) -> dict:
    """Arguments of int8_geglu_gemm with random codes, two samples, values and gates near 1."""

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)

    samples = 2 if M % 2 == 0 else 1
    zero_point = torch.randint(-60, 60, (samples,), generator=generator, dtype=torch.int32) if asymmetric else None
    qweight = codes(2 * N, K)
    return {
        "activation": QuantizedActivation(codes(M, K), torch.rand(samples, generator=generator) + 0.5, zero_point, M // samples),
        "qweight": qweight,
        "weight_scale": (torch.rand(2 * N, generator=generator) + 0.5) * 2e-4 / K**0.5,
        "weight_sum": qweight.sum(1, dtype=torch.int32),
        "bias": torch.randn(2 * N, generator=generator),
    }


def expected_float64(arguments: dict) -> torch.Tensor:
    weight = arguments["qweight"].double() * arguments["weight_scale"].double()[:, None]
    y = arguments["activation"].dequantize(torch.float64) @ weight.t() + arguments["bias"].double()
    value, gate = y.chunk(2, 1)
    return value * torch.nn.functional.gelu(gate)


def moved(arguments: dict, device: torch.device) -> dict:
    a = arguments["activation"]
    zero_point = None if a.zero_point is None else a.zero_point.to(device)
    on_device = QuantizedActivation(a.codes.to(device), a.scale.to(device), zero_point, a.rows_per_scale)
    rest = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    return rest | {"activation": on_device}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("shape", [(1, 64, 64), (77, 65, 333)], ids=str)
def test_int8_geglu_gemm_reference_matches_float64(shape, asymmetric, generator):
    arguments = layer(*shape, generator, asymmetric)
    assert relative_error(int8_geglu_gemm_ref(**arguments, out_dtype=torch.float32), expected_float64(arguments)) <= 5e-6
    assert relative_error(int8_geglu_gemm_ref(**arguments), expected_float64(arguments)) <= 5e-4


@pytest.mark.parametrize("shape", [(70, 72, 96), (33, 65, 48), (1, 8, 16)], ids=str)
@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS.keys())
def test_int8_geglu_gemm_kernel_is_the_reference_for_every_design(design, shape, generator, triton_device):
    arguments = layer(*shape, generator)
    with forced_design(design):
        y = dispatch.int8_geglu_gemm(**moved(arguments, triton_device), out_dtype=torch.float32)
    assert relative_error(y, int8_geglu_gemm_ref(**arguments, out_dtype=torch.float32)) <= 3e-5  # gelu_erf's


def test_int8_geglu_gemm_kernel_takes_ragged_k_no_bias_and_no_zero_point(generator, triton_device):
    arguments = layer(20, 65, 333, generator, asymmetric=False) | {"bias": None, "weight_sum": None}
    y = dispatch.int8_geglu_gemm(**moved(arguments, triton_device))
    assert y.dtype == torch.float16
    assert relative_error(y, int8_geglu_gemm_ref(**arguments)) <= 5e-4


@pytest.mark.parametrize("design", [DESIGNS["pointers"], DESIGNS["halves"], None], ids=["pointers", "halves", "default"])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
def test_int8_geglu_gemm_kernel_stores_the_references_codes(asymmetric, design, generator, triton_device):
    arguments, zero_point = layer(70, 72, 96, generator), torch.arange(-120, -56, dtype=torch.int32) if asymmetric else None
    scales = StaticScale(torch.linspace(0.02, 0.05, 64), zero_point, torch.tensor([3, 40]))
    expected = int8_geglu_gemm_ref(**arguments, static=scales)
    on_device = [None if entry is None else entry.to(triton_device) for entry in (scales.scale, zero_point, scales.bucket)]
    with nullcontext() if design is None else forced_design(design):
        found = dispatch.int8_geglu_gemm(**moved(arguments, triton_device), static=StaticScale(*on_device))
    assert torch.equal(found.scale.cpu(), expected.scale)
    assert not asymmetric or torch.equal(found.zero_point.cpu(), expected.zero_point)
    apart = (found.codes.cpu().int() - expected.codes.int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() <= 1e-3
    assert found.rows_per_scale == expected.rows_per_scale == 35 and (found.zero_point is None) != asymmetric


def test_int8_geglu_gemm_is_the_reference_up_to_rounding_when_dequantized(generator, monkeypatch):
    arguments = layer(20, 16, 64, generator)
    monkeypatch.setenv(backend.OVERRIDE, "dequantized")
    backend.forget_choices()
    try:
        y = dispatch.int8_geglu_gemm(**arguments, out_dtype=torch.float32)
    finally:
        backend.forget_choices()
    assert relative_error(y, int8_geglu_gemm_ref(**arguments, out_dtype=torch.float32)) <= 1e-5


def test_int8_geglu_gemm_refuses_a_weight_without_two_halves(generator):
    arguments = layer(20, 16, 64, generator)
    for name in ("qweight", "weight_scale", "weight_sum", "bias"):
        arguments[name] = arguments[name][:-1]
    with pytest.raises(LayoutError, match="31 output channels; an even number"):
        int8_geglu_gemm_ref(**arguments)
