"""int8_gemm_many: what int8_gemm gives for each weight, in one launch where tiles divide the weights."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import LayoutError
from stepquant.kernels import dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.design import Design
from stepquant.kernels.dispatch import LinearWeight
from stepquant.kernels.int8_gemm import int8_gemm_ref
from stepquant.kernels.tables import forced_design

DESIGNS = {
    "pointers": Design(64, 64, 32, 4, 2),
    "descriptors": Design(64, 64, 32, 4, 2, tma=True),
    "halves": Design(64, 64, 32, 1, 2, group_m=1, tma=True),
    "split and persistent are left out": Design(64, 64, 32, 4, 2, split_k=2),
}


def layers(count: int, N: int, K: int, generator: torch.Generator, bias: bool) -> list[LinearWeight]:
    found = []
    for _ in range(count):
        qweight = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
        scale = torch.rand(N, generator=generator) * 1e-3 + 1e-4
        found.append(LinearWeight(qweight, scale, qweight.sum(1, dtype=torch.int32), torch.randn(N, generator=generator) if bias else None))
    return found


def activation(M: int, K: int, generator: torch.Generator, asymmetric: bool) -> QuantizedActivation:
    zero_point = torch.randint(-128, 128, (2,), generator=generator, dtype=torch.int32) if asymmetric else None
    codes = torch.randint(-128, 128, (M, K), generator=generator, dtype=torch.int8)
    return QuantizedActivation(codes, torch.rand(2, generator=generator) + 0.1, zero_point, M // 2)


def run(a: QuantizedActivation, weights: list[LinearWeight], device: torch.device) -> list[torch.Tensor]:
    zero_point = None if a.zero_point is None else a.zero_point.to(device)
    moved = QuantizedActivation(a.codes.to(device), a.scale.to(device), zero_point, a.rows_per_scale)
    on_device = [LinearWeight(*(None if part is None else part.to(device) for part in weight)) for weight in weights]
    return dispatch.int8_gemm_many(moved, on_device, torch.float32)


def assert_is_the_reference(found: list[torch.Tensor], a: QuantizedActivation, weights: list[LinearWeight]) -> None:
    assert len(found) == len(weights)
    for y, weight in zip(found, weights, strict=True):
        expected = int8_gemm_ref(a, *weight, torch.float32)
        assert float((y.cpu() - expected).norm() / expected.norm()) <= 1e-6


@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS.keys())
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_int8_gemm_many_is_the_reference_for_every_design(bias, design, generator, triton_device):
    a, weights = activation(70, 96, generator, asymmetric=bias), layers(3, 128, 96, generator, bias)
    with forced_design(design):
        found = run(a, weights, triton_device)
    assert_is_the_reference(found, a, weights)
    assert [y.stride() for y in found] == [(384, 1)] * 3


@pytest.mark.parametrize(("count", "N", "K"), [(1, 64, 48), (2, 64, 48), (3, 72, 48), (3, 64, 33)], ids=str)
@pytest.mark.parametrize("name", ["pointers", "descriptors"])
def test_int8_gemm_many_takes_fewer_weights_and_odd_shapes(name, count, N, K, generator, triton_device):
    a, weights = activation(34, K, generator, asymmetric=True), layers(count, N, K, generator, bias=False)
    with forced_design(DESIGNS[name]):
        assert_is_the_reference(run(a, weights, triton_device), a, weights)


def test_int8_gemm_many_takes_plain_tuples_on_the_reference(generator):
    a, weights = activation(4, 16, generator, asymmetric=False), layers(2, 8, 16, generator, bias=False)
    assert_is_the_reference(dispatch.int8_gemm_many(a, [tuple(weight) for weight in weights], torch.float32), a, weights)


def test_int8_gemm_many_refuses_weights_of_different_shapes(generator):
    a = activation(4, 16, generator, asymmetric=False)
    weights = layers(1, 8, 16, generator, bias=False) + layers(1, 12, 16, generator, bias=False)
    with pytest.raises(LayoutError, match="2 weights of shapes"):
        dispatch.int8_gemm_many(a, weights)
    with pytest.raises(LayoutError, match="4 weights of shapes"):
        dispatch.int8_gemm_many(a, weights[:1] * 4)
