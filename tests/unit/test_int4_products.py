"""The products that share int4_gemm's weights: GEGLU at the end, several weights at once, the expanded form, float rows."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import LayoutError
from stepquant.kernels import backend, dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.design import EXPANDED, Design
from stepquant.kernels.dispatch import Int4LinearWeight
from stepquant.kernels.int4_geglu_gemm import int4_geglu_gemm_ref
from stepquant.kernels.int4_gemm import int4_gemm_ref
from stepquant.kernels.int4_gemm_many import int4_gemm_many_ref
from stepquant.kernels.int4_weight import expanded_codes, paired_scales
from stepquant.kernels.static_scale import StaticScale
from stepquant.kernels.tables import forced_design

DESIGNS = {
    "fused": Design(32, 64, 128, 4, 2),
    "fused in quarters": Design(64, 64, 128, 1, 2, group_m=1),
    "expanded": Design(64, 64, 64, 4, 2, backend=EXPANDED),
    "expanded, descriptors": Design(64, 64, 64, 4, 2, tma=True, backend=EXPANDED),
}


def weights(N: int, K: int, generator: torch.Generator, bias: bool = True, scale: float = 1e-3) -> Int4LinearWeight:
    """A layer with random nibbles and group scales of both signs."""
    qweight = torch.randint(0, 256, (N, -(-K // 128) * 64), generator=generator, dtype=torch.uint8)
    group_scale = paired_scales(torch.randint(-15, 16, (K // 64, N), generator=generator, dtype=torch.int8))
    sums = expanded_codes(qweight, group_scale, K).sum(1, dtype=torch.int32)
    vectors = (torch.rand(N, generator=generator) + 0.5) * scale, sums, torch.randn(N, generator=generator) if bias else None
    return Int4LinearWeight(qweight, group_scale, *vectors)


def activation(M: int, K: int, generator: torch.Generator, asymmetric: bool = True) -> QuantizedActivation:
    samples = 2 if M % 2 == 0 else 1
    zero_point = torch.randint(-60, 60, (samples,), generator=generator, dtype=torch.int32) if asymmetric else None
    codes = torch.randint(-128, 128, (M, K), generator=generator, dtype=torch.int8)
    return QuantizedActivation(codes, torch.rand(samples, generator=generator) * 0.1 + 0.05, zero_point, M // samples)


def moved(a: QuantizedActivation, device: torch.device) -> QuantizedActivation:
    zero_point = None if a.zero_point is None else a.zero_point.to(device)
    return QuantizedActivation(a.codes.to(device), a.scale.to(device), zero_point, a.rows_per_scale)


def on(weight: Int4LinearWeight, device: torch.device) -> Int4LinearWeight:
    return Int4LinearWeight(*(None if part is None else part.to(device) for part in weight))


def float64_product(x: torch.Tensor, weight: Int4LinearWeight) -> torch.Tensor:
    codes = expanded_codes(weight.qweight, weight.group_scale, x.shape[1]).double()
    y = x.double() @ (codes * weight.weight_scale.double()[:, None]).t()
    return y if weight.bias is None else y + weight.bias.double()


def float64_geglu(a: QuantizedActivation, weight: Int4LinearWeight) -> torch.Tensor:
    value, gate = float64_product(a.dequantize(torch.float64), weight).chunk(2, 1)
    return value * torch.nn.functional.gelu(gate)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("shape", [(1, 64, 64), (77, 65, 320)], ids=str)
def test_int4_geglu_gemm_reference_matches_float64(shape, asymmetric, generator):
    M, N, K = shape
    a, weight = activation(M, K, generator, asymmetric), weights(2 * N, K, generator)
    assert relative_error(int4_geglu_gemm_ref(a, *weight, out_dtype=torch.float32), float64_geglu(a, weight)) <= 5e-6
    assert relative_error(int4_geglu_gemm_ref(a, *weight), float64_geglu(a, weight)) <= 5e-4


@pytest.mark.parametrize("shape", [(70, 72, 128), (33, 65, 192), (1, 8, 64)], ids=str)
@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS.keys())
def test_int4_geglu_gemm_kernel_matches_float64_for_every_design(design, shape, generator, triton_device):
    M, N, K = shape
    a, weight = activation(M, K, generator), weights(2 * N, K, generator)
    with forced_design(design):
        y = dispatch.int4_geglu_gemm(moved(a, triton_device), *on(weight, triton_device), out_dtype=torch.float32)
    assert relative_error(y, float64_geglu(a, weight)) <= 3e-5  # gelu_erf's


@pytest.mark.parametrize("design", ["fused", "expanded"])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
def test_int4_geglu_gemm_kernel_stores_the_references_codes_and_counts_clipped_values(asymmetric, design, generator, triton_device):
    a, weight = activation(70, 192, generator), weights(144, 192, generator)
    zero_point = torch.arange(-120, -56, dtype=torch.int32) if asymmetric else None

    def run(call: object, device: torch.device) -> tuple[QuantizedActivation, torch.Tensor]:
        clipped = torch.zeros(2, dtype=torch.int32, device=device)
        tables = (torch.linspace(0.002, 0.005, 64), zero_point, torch.tensor([3, 40]))
        static = StaticScale(*(None if table is None else table.to(device) for table in tables), clipped)
        return call(moved(a, device), *on(weight, device), static=static), clipped

    expected, expected_clipped = run(int4_geglu_gemm_ref, torch.device("cpu"))
    with forced_design(DESIGNS[design]):
        found, clipped = run(dispatch.int4_geglu_gemm, triton_device)
    apart = (found.codes.cpu().int() - expected.codes.int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() <= 1e-3
    assert torch.equal(found.scale.cpu(), expected.scale) and found.rows_per_scale == expected.rows_per_scale == 35
    assert not asymmetric or torch.equal(found.zero_point.cpu(), expected.zero_point)
    assert expected_clipped[0] > 0 and clipped[1] == expected_clipped[1] == 70
    assert abs(int(clipped[0]) - int(expected_clipped[0])) <= 2


@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS.keys())
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_int4_gemm_many_matches_float64_for_every_design(bias, design, generator, triton_device):
    a, three = activation(70, 192, generator, asymmetric=bias), [weights(128, 192, generator, bias) for _ in range(3)]
    with forced_design(design):
        found = dispatch.int4_gemm_many(moved(a, triton_device), [on(weight, triton_device) for weight in three], torch.float32)
    for y, weight in zip(found, three, strict=True):
        assert relative_error(y, float64_product(a.dequantize(torch.float64), weight)) <= 5e-6
        assert y.stride() == (384, 1)


@pytest.mark.parametrize(("count", "N", "K"), [(1, 64, 128), (2, 64, 64), (3, 72, 64)], ids=str)
@pytest.mark.parametrize("design", ["fused", "expanded, descriptors"])
def test_int4_gemm_many_takes_fewer_weights_and_rows_that_tiles_do_not_divide(design, count, N, K, generator, triton_device):
    a, some = activation(34, K, generator), [weights(N, K, generator, bias=False) for _ in range(count)]
    with forced_design(DESIGNS[design]):
        found = dispatch.int4_gemm_many(moved(a, triton_device), [on(weight, triton_device) for weight in some], torch.float32)
    for y, weight in zip(found, some, strict=True):
        assert relative_error(y, float64_product(a.dequantize(torch.float64), weight)) <= 5e-6


@pytest.mark.parametrize(("count", "N", "K"), [(1, 70, 64), (2, 130, 192), (6, 5, 320)], ids=str)
def test_int4_expand_writes_every_weights_codes(count, N, K, generator, triton_device):
    some = [on(weights(N, K, generator), triton_device) for _ in range(count)]
    found = dispatch.int4_expand([weight.qweight for weight in some], [weight.group_scale for weight in some], K)
    for codes, weight in zip(found, some, strict=True):
        assert codes.shape == (N, K) and torch.equal(codes, expanded_codes(weight.qweight, weight.group_scale, K))


def test_int4_expand_refuses_weights_of_different_shapes(generator):
    two = [weights(8, 64, generator), weights(12, 64, generator)]
    with pytest.raises(LayoutError, match="int4_expand: 2 weights of shapes"):
        dispatch.int4_expand([weight.qweight for weight in two], [weight.group_scale for weight in two], 64)


def test_int4_gemm_many_refuses_weights_of_different_shapes(generator):
    a, two = activation(4, 64, generator), [weights(8, 64, generator), weights(12, 64, generator)]
    with pytest.raises(LayoutError, match="int4_gemm_many: 2 weights of shapes"):
        int4_gemm_many_ref(a, two)


def test_int4_geglu_gemm_refuses_a_weight_without_two_halves(generator):
    with pytest.raises(LayoutError, match="int4_geglu_gemm: 31 output channels; an even number"):
        int4_geglu_gemm_ref(activation(4, 64, generator), *weights(31, 64, generator))


@pytest.mark.parametrize("shape", [(1, 64, 64), (77, 130, 192), (9, 70, 320)], ids=str)
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_int4_gemm_of_expanded_codes_is_the_reference_with_what_follows(tma, shape, generator, triton_device):
    M, N, K = shape
    a, weight = activation(M, K, generator), weights(N, K, generator)
    addend = torch.randn(M, N, generator=generator)
    with forced_design(Design(64, 32, 64, 4, 2, tma=tma, backend=EXPANDED)):
        y = dispatch.int4_gemm(moved(a, triton_device), *on(weight, triton_device), torch.float32, addend=addend.to(triton_device))
    assert relative_error(y, int4_gemm_ref(a, *weight, torch.float32, addend=addend)) <= 1e-6


# One row, a few with K of half a block, of uneven and of many blocks; more rows or K, which are cuBLAS's.
@pytest.mark.parametrize("shape", [(1, 70, 64), (2, 130, 320), (4, 20, 2240), (2, 3, 8256), (5, 70, 320)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_int4_gemm_of_float_rows_matches_float64(dtype, shape, generator, triton_device):
    M, N, K = shape
    x, weight = torch.randn(M, K, generator=generator).to(dtype), weights(N, K, generator)
    y = dispatch.int4_gemm(x.to(triton_device), *on(weight, triton_device), torch.float32)
    is_rounded = (M > 4 or K > 8192) and dtype is torch.float16
    assert relative_error(y, float64_product(x, weight)) <= (1e-3 if is_rounded else 5e-6)


def test_int4_gemm_of_float_rows_adds_and_stores_codes_as_the_reference(generator, triton_device):
    x, weight = torch.randn(8, 192, generator=generator), weights(40, 192, generator)
    extras = {"addend": torch.randn(8, 40, generator=generator), "out_scale": torch.tensor([0.05])}
    on_device = {name: tensor.to(triton_device) for name, tensor in extras.items()}
    y = dispatch.int4_gemm(x.to(triton_device), *on(weight, triton_device), torch.float32, **on_device)
    expected = int4_gemm_ref(x, *weight, torch.float32, **extras)
    assert (y.codes.cpu().int() - expected.codes).abs().max() <= 1


def test_int4_products_are_the_references_up_to_rounding_when_dequantized(generator, monkeypatch):
    a, weight = activation(20, 64, generator), weights(32, 64, generator)
    expected = int4_geglu_gemm_ref(a, *weight, out_dtype=torch.float32), *int4_gemm_many_ref(a, [weight] * 2, torch.float32)
    monkeypatch.setenv(backend.OVERRIDE, "dequantized")
    backend.forget_choices()
    try:
        found = dispatch.int4_geglu_gemm(a, *weight, out_dtype=torch.float32), *dispatch.int4_gemm_many(a, [weight] * 2, torch.float32)
    finally:
        backend.forget_choices()
    assert all(relative_error(y, reference) <= 1e-5 for y, reference in zip(found, expected, strict=True))
