"""Gluon's kernels on a Hopper GPU, which nothing can interpret: against the references, with shapes that divide nothing evenly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stepquant.kernels import dispatch
from stepquant.kernels.activation import FP8, QuantizedActivation
from stepquant.kernels.backend import Backend
from stepquant.kernels.design import GLUON, Design
from stepquant.kernels.fp8_geglu_gemm import fp8_geglu_gemm_ref
from stepquant.kernels.fp8_gemm import fp8_gemm_ref
from stepquant.kernels.int8_geglu_gemm import int8_geglu_gemm_ref
from stepquant.kernels.int8_gemm import int8_gemm_ref
from stepquant.kernels.static_scale import StaticScale
from stepquant.kernels.tables import forced_design, load_table

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(
    not HOPPER or dispatch.choose_backend("cuda").backend is not Backend.TRITON,
    reason="needs an NVIDIA Hopper GPU (sm_90) with Triton; `python -m stepquant check` says what is missing",
)

DESIGNS = [
    *{design for design in load_table(90).rows.values() if design.backend == GLUON},
    Design(64, 128, 128, 4, 3, backend=GLUON, rest_n=32),
]
SHAPES = [(200, 336, 208), (130, 80, 64), (1, 1280, 1280), (2048, 320, 272), (2048, 1280, 1280)]
DEVICE = "cuda"
design_ids = pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.label)
shape_ids = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Operands:
    """Of one product: activation, weight and all that may follow. N: rows of the weight."""

    def __init__(self, M: int, N: int, K: int, dtype: torch.dtype = torch.int8, has_zero_point: bool = False) -> None:
        self.generator = torch.Generator(DEVICE).manual_seed(M + N + K)
        codes, self.qweight = self._codes((M, K), dtype), self._codes((N, K), dtype)
        unit = 1.0 if dtype is torch.int8 else 50.0
        zero_point = torch.randint(-20, 20, (M,), dtype=torch.int32, device=DEVICE, generator=self.generator) if has_zero_point else None
        self.activation = QuantizedActivation(codes, unit * (0.005 + 0.01 * self._rand(M)), zero_point, 1)
        self.weight_scale = unit * (1e-4 + 2e-4 * self._rand(N))
        self.weight_sum = self.qweight.sum(1, dtype=torch.int32) if has_zero_point else None
        self.bias = torch.randn(N, device=DEVICE, generator=self.generator).half()

    def _rand(self, size: int) -> torch.Tensor:
        return torch.rand(size, device=DEVICE, generator=self.generator)

    def _codes(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        if dtype is torch.int8:
            return torch.randint(-127, 128, shape, dtype=dtype, device=DEVICE, generator=self.generator)
        return torch.randn(shape, device=DEVICE, generator=self.generator).to(dtype)

    def addend(self, N: int) -> torch.Tensor:
        return torch.randn(self.activation.rows, N, device=DEVICE, generator=self.generator).half()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def static_scale(has_zero_point: bool = True) -> StaticScale:
    zero_point = torch.full((64,), 3, dtype=torch.int32, device=DEVICE) if has_zero_point else None
    bucket, counters = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    return StaticScale(torch.full((64,), 0.02, device=DEVICE), zero_point, bucket, counters)


@design_ids
@shape_ids
@pytest.mark.parametrize("has_zero_point", [False, True], ids=["symmetric", "zero point"])
def test_gluon_gemm_matches_the_reference_with_and_without_an_addend(design, shape, has_zero_point):
    o = Operands(*shape, has_zero_point=has_zero_point)
    with forced_design(design):
        for addend in (None, o.addend(shape[1])):
            arguments = (o.activation, o.qweight, o.weight_scale, o.weight_sum, o.bias)
            y = dispatch.int8_gemm(*arguments, addend=addend)
            assert relative_error(y, int8_gemm_ref(*arguments, out_dtype=torch.float32, addend=addend)) < 5e-4
            assert torch.equal(y, dispatch.int8_gemm(*arguments, addend=addend))


@design_ids
def test_gluon_gemm_many_equals_one_after_the_other(design):
    parts = [Operands(300, 640, 272) for _ in range(3)]
    weights = [(o.qweight + index, o.weight_scale, None, o.bias) for index, o in enumerate(parts)]
    with forced_design(design):
        for actual, weight in zip(dispatch.int8_gemm_many(parts[0].activation, weights), weights, strict=True):
            assert relative_error(actual, int8_gemm_ref(parts[0].activation, *weight, out_dtype=torch.float32)) < 5e-4


@design_ids
@shape_ids
@pytest.mark.parametrize("has_zero_point", [False, True], ids=["symmetric", "zero point"])
def test_gluon_geglu_matches_the_reference_in_floats_codes_and_counts(design, shape, has_zero_point):
    o, static = Operands(*shape, has_zero_point=has_zero_point), static_scale()
    arguments = (o.activation, o.qweight, o.weight_scale, o.weight_sum, o.bias)
    with forced_design(design):
        floats, codes = dispatch.int8_geglu_gemm(*arguments), dispatch.int8_geglu_gemm(*arguments, static=static)
    assert relative_error(floats, int8_geglu_gemm_ref(*arguments, out_dtype=torch.float32)) < 5e-4
    counted = replace(static, clipped=torch.zeros_like(static.clipped))
    expected = int8_geglu_gemm_ref(*arguments, static=counted)
    assert (codes.codes.int() - expected.codes.int()).abs().max() <= 1
    assert torch.equal(codes.scale, expected.scale) and torch.equal(codes.zero_point, expected.zero_point)
    (clipped, rows), (expected_clipped, expected_rows) = static.clipped.tolist(), counted.clipped.tolist()
    assert rows == expected_rows and abs(clipped - expected_clipped) <= 3 + 0.01 * expected_clipped


@design_ids
@shape_ids
def test_gluon_fp8_products_match_the_reference(design, shape):
    o = Operands(*shape, dtype=FP8)
    arguments, static = (o.activation, o.qweight, o.weight_scale, o.bias), static_scale(has_zero_point=False)
    addend = o.addend(shape[1])
    with forced_design(design):
        y, gated = dispatch.fp8_gemm(*arguments, addend=addend), dispatch.fp8_geglu_gemm(*arguments, static=static)
    assert relative_error(y, fp8_gemm_ref(*arguments, out_dtype=torch.float32, addend=addend)) < 5e-3
    expected = fp8_geglu_gemm_ref(*arguments, static=replace(static, clipped=torch.zeros_like(static.clipped)))
    assert relative_error(gated.codes.float(), expected.codes.float()) < 3e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gluon_gemm_is_recorded_in_a_cuda_graph_and_repeats(dtype):
    o = Operands(2048, 1280, 1280)
    arguments = (o.activation, o.qweight, o.weight_scale, None, o.bias, dtype)
    expected = dispatch.int8_gemm(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dispatch.int8_gemm(*arguments)
    o.activation.codes.neg_()
    graph.replay()
    assert relative_error(y, int8_gemm_ref(*arguments[:5], torch.float32)) < (5e-4 if dtype is torch.float16 else 4e-3)
    assert not torch.equal(y, expected)
