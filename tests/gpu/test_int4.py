"""4-bit weights on a real GPU: SDXL's shapes, both forms, exact sums, float rows, CUDA graphs. Their cost: benchmarks/int4.py."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from stepquant.kernels import dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.backend import Backend
from stepquant.kernels.design import EXPANDED, Design
from stepquant.kernels.int4_gemm import int4_gemm_ref
from stepquant.kernels.int4_weight import expanded_codes, paired_scales
from stepquant.kernels.tables import forced_design

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or dispatch.choose_backend("cuda").backend is not Backend.TRITON,
    reason="needs an NVIDIA GPU (sm_80 or newer) with Triton; `python -m stepquant check` says what is missing",
)

DEVICE = "cuda"
# M, N, K: the deep and the upper level, the prompt's keys, an embedding, and sizes that divide nothing but groups of 64.
SHAPES = [(2048, 10240, 1280), (2048, 1280, 5120), (8192, 640, 640), (154, 1280, 2048), (2, 640, 1280), (77, 330, 192)]
TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
DESIGNS = [
    Design(128, 128, 128, 8, 3), Design(64, 128, 128, 4, 3), Design(16, 64, 128, 4, 3), Design(64, 64, 128, 4, 4, tma=True),
    Design(128, 64, 128, 4, 3, tma=True), Design(128, 128, 128, 8, 3, backend=EXPANDED),
    Design(64, 128, 128, 4, 3, tma=True, backend=EXPANDED),
]  # fmt: skip
IDS = ["default", *[f"{design.label} {design.BLOCK_M}x{design.BLOCK_N} tma={design.tma}" for design in DESIGNS]]


def weight(N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(1)
    qweight = torch.randint(0, 256, (N, -(-K // 128) * 64), generator=generator, dtype=torch.uint8, device=DEVICE)
    return qweight, paired_scales(torch.randint(-15, 16, (K // 64, N), generator=generator, dtype=torch.int8, device=DEVICE))


def codes(M: int, K: int, largest: int = 128) -> torch.Tensor:
    return torch.randint(-largest, largest, (M, K), generator=torch.Generator(DEVICE).manual_seed(0), dtype=torch.int8, device=DEVICE)


@pytest.mark.parametrize("design", [None, *DESIGNS], ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int4_gemm_sums_equal_the_reference_bit_for_bit_on_sdxl_shapes(shape, design):
    M, N, K = shape
    arguments = (QuantizedActivation(codes(M, K, 8), torch.ones(1, device=DEVICE), None, M), *weight(N, K), torch.ones(N, device=DEVICE))
    expected = int4_gemm_ref(*arguments, out_dtype=torch.float32)
    assert expected.abs().max() < 2**24  # fp32 holds the sums
    if design is None:
        y = dispatch.int4_gemm(*arguments, out_dtype=torch.float32)
    else:
        with forced_design(design):
            y = dispatch.int4_gemm(*arguments, out_dtype=torch.float32)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("out_dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int4_gemm_scales_and_adds_as_float64_on_sdxl_shapes(shape, out_dtype):
    M, N, K = shape
    qweight, group_scale = weight(N, K)
    expanded = expanded_codes(qweight, group_scale, K)
    scale, zero_point = torch.rand(M, device=DEVICE) * 0.01, torch.randint(-90, 90, (M,), dtype=torch.int32, device=DEVICE)
    weight_scale, bias, addend = torch.rand(N, device=DEVICE), torch.randn(N, device=DEVICE), torch.randn(M, N, device=DEVICE)
    rows = QuantizedActivation(codes(M, K), scale, zero_point, 1)
    sums = expanded.sum(1, dtype=torch.int32)
    y = dispatch.int4_gemm(rows, qweight, group_scale, weight_scale, sums, bias, out_dtype, addend=addend)
    x = (rows.codes.double() - zero_point[:, None]) * scale[:, None].double()
    expected = x @ (expanded.double() * weight_scale[:, None]).t() + bias + addend
    assert float((y.double() - expected).norm() / expected.norm()) <= TOLERANCE[out_dtype]


@pytest.mark.parametrize("design", [None, *DESIGNS], ids=IDS)
@pytest.mark.parametrize("shape", [(2048, 640, 1280), (77, 320, 192), (300, 130, 320)], ids=str)
def test_int4_gemm_many_and_geglu_match_float64(shape, design):
    M, N, K = shape
    three = [(*weight(N, K), torch.rand(N, device=DEVICE) * 1e-4, None, torch.randn(N, device=DEVICE)) for _ in range(3)]
    pair = (*weight(2 * N, K), torch.rand(2 * N, device=DEVICE) * 1e-4, None, torch.randn(2 * N, device=DEVICE))
    rows = QuantizedActivation(codes(M, K), torch.rand(M, device=DEVICE) * 0.1, None, 1)
    with nullcontext() if design is None else forced_design(design):
        found = dispatch.int4_gemm_many(rows, three, torch.float32), dispatch.int4_geglu_gemm(rows, *pair, out_dtype=torch.float32)
    for y, one in zip(found[0], three, strict=True):
        expected = float64_product(rows, one)
        assert float((y.double() - expected).norm() / expected.norm()) <= 5e-6
    value, gate = float64_product(rows, pair).chunk(2, 1)
    expected = value * torch.nn.functional.gelu(gate)
    assert float((found[1].double() - expected).norm() / expected.norm()) <= 3e-5  # gelu_erf's


@pytest.mark.parametrize(("count", "N", "K"), [(6, 1280, 1280), (1, 10240, 1280), (3, 130, 192)], ids=str)
def test_int4_expand_writes_every_weights_codes(count, N, K):
    some = [weight(N, K) for _ in range(count)]
    found = dispatch.int4_expand([qweight for qweight, _ in some], [scale for _, scale in some], K)
    assert all(torch.equal(codes, expanded_codes(*one, K)) for codes, one in zip(found, some, strict=True))


def float64_product(rows: QuantizedActivation, one: tuple) -> torch.Tensor:
    qweight, group_scale, weight_scale, _, bias = one
    expanded = expanded_codes(qweight, group_scale, rows.codes.shape[1]).double() * weight_scale[:, None]
    return rows.dequantize(torch.float64) @ expanded.t() + bias


# Up to 4 rows nothing is rounded; for more the weight is rounded to the rows' dtype.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1280, 1280), (4, 320, 5120)], ids=str)
def test_int4_gemm_of_16_bit_rows_matches_float64_on_sdxl_shapes(shape, dtype, tolerance):
    M, N, K = shape
    x = torch.randn(M, K, device=DEVICE).to(dtype)
    qweight, group_scale = weight(N, K)
    weight_scale = torch.rand(N, device=DEVICE) * 0.01
    y = dispatch.int4_gemm(x, qweight, group_scale, weight_scale, out_dtype=torch.float32)
    expected = x.double() @ (expanded_codes(qweight, group_scale, K).double() * weight_scale[:, None]).t()
    assert float((y.double() - expected).norm() / expected.norm()) <= (5e-6 if M <= 4 else tolerance)


def test_int4_gemm_runs_in_a_cuda_graph_and_never_waits_for_the_gpu():
    x, weights, ones = torch.randn(2048, 1280, device=DEVICE).half(), weight(1280, 1280), torch.ones(1280, device=DEVICE)

    def step() -> tuple[torch.Tensor, ...]:
        rows = dispatch.quantize_token(x)
        few, all_rows = (dispatch.int4_gemm(part, *weights, ones) for part in (x[:2], x))
        many = dispatch.int4_gemm_many(rows, [(*weights, ones)] * 3)
        return dispatch.int4_gemm(rows, *weights, ones), *many, dispatch.int4_geglu_gemm(rows, *weights, ones), few, all_rows

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
