"""int8_gemm: exact integer sums, the reference against float64, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import LayoutError
from stepquant.kernels import dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.exact_matmul import matmul_int8
from stepquant.kernels.int8_gemm import int8_gemm_ref
from stepquant.kernels.quantize_token import quantize_token_ref

SHAPES = [(1, 64, 64), (77, 130, 333), (154, 640, 2048)]  # M, N, K; the last is SDXL's cross-attention K
# Relative norm to float64: what rounding to the dtype alone gives, and a margin of 2.5.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def codes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def layer(shape: tuple[int, int, int], generator: torch.Generator, entries: int = 1, asymmetric: bool = True) -> dict:
    """Arguments of int8_gemm with random codes and scales; `entries` activation scales."""
    M, N, K = shape
    qweight = codes((N, K), generator)
    zero_point = torch.randint(-128, 128, (entries,), generator=generator, dtype=torch.int32) if asymmetric else None
    return {
        "activation": QuantizedActivation(
            codes((M, K), generator), torch.rand(entries, generator=generator) * 0.01 + 0.001, zero_point, M // entries
        ),
        "qweight": qweight,
        "weight_scale": torch.rand(N, generator=generator) * 0.001 + 0.0001,
        "weight_sum": qweight.sum(1, dtype=torch.int32),
        "bias": torch.randn(N, generator=generator),
    }


def to_device(arguments: dict, device: torch.device) -> dict:
    a = arguments["activation"]
    moved = QuantizedActivation(
        a.codes.to(device), a.scale.to(device), None if a.zero_point is None else a.zero_point.to(device), a.rows_per_scale
    )
    return {"activation": moved} | {k: None if v is None else v.to(device) for k, v in arguments.items() if k != "activation"}


def expected_float64(arguments: dict) -> torch.Tensor:
    """The same layer on dequantized operands, in float64."""
    weight = arguments["qweight"].double() * arguments["weight_scale"].double()[:, None]
    a = arguments["activation"]
    zero_point = torch.zeros_like(a.scale) if a.zero_point is None else a.zero_point
    x = (a.codes.double() - a.per_row(zero_point)[:, None]) * a.per_row(a.scale).double()[:, None]
    y = x @ weight.t()
    return y if arguments["bias"] is None else y + arguments["bias"].double()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("K", [1, 64, 333, 1024, 1025, 5120])
def test_int8_gemm_sums_are_exact_int32(K, generator):
    a, w = codes((19, K), generator), codes((40, K), generator)
    result = matmul_int8(a, w)
    assert result.dtype == torch.int32
    assert torch.equal(result.long(), a.long() @ w.long().t())


def test_int8_gemm_sums_are_exact_when_every_product_is_the_largest(generator):
    a, w = torch.full((17, 3000), -128, dtype=torch.int8), torch.full((8, 3000), -128, dtype=torch.int8)
    a[1:, 7] = -127  # an odd sum beyond 2^24 would not survive in fp32
    assert torch.equal(matmul_int8(a, w).long(), a.long() @ w.long().t())


def test_int8_gemm_sums_are_exact_under_autocast(generator):
    a, w = codes((64, 640), generator), codes((64, 640), generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = matmul_int8(a, w)
    assert torch.equal(result.long(), a.long() @ w.long().t())


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("out_dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_gemm_reference_matches_float64(shape, out_dtype, asymmetric, generator):
    arguments = layer(shape, generator, asymmetric=asymmetric)
    y = int8_gemm_ref(**arguments, out_dtype=out_dtype)
    assert y.dtype == out_dtype
    assert relative_error(y, expected_float64(arguments)) <= TOLERANCE[out_dtype]


@pytest.mark.parametrize("entries", [78, 3], ids=["per token", "per sample"])
def test_int8_gemm_reference_matches_float64_when_scales_differ_by_row(entries, generator):
    arguments = layer((78, 130, 333), generator, entries)
    assert relative_error(int8_gemm_ref(**arguments, out_dtype=torch.float32), expected_float64(arguments)) <= 5e-6


@pytest.mark.parametrize("shape", [*SHAPES[:2], (5, 70, 2048), (300, 140, 640)], ids=str)
def test_int8_gemm_kernel_sums_equal_the_exact_ones_bit_for_bit(shape, generator, triton_device):
    arguments = layer(shape, generator, asymmetric=False)
    a = arguments["activation"]
    # With scales of 1 the fp32 result is the int32 sum, as long as that is below 2^24.
    narrow = QuantizedActivation(a.codes.clamp(-90, 90), torch.ones(1), None, a.rows)
    arguments |= {"activation": narrow, "weight_scale": torch.ones(shape[1]), "bias": None}
    exact = narrow.codes.long() @ arguments["qweight"].long().t()
    assert exact.abs().max() < 2**24
    y = dispatch.int8_gemm(**to_device(arguments, triton_device), out_dtype=torch.float32)
    assert torch.equal(y.cpu().long(), exact)


@pytest.mark.parametrize("out_dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("entries", [1, 3, 78], ids=["one scale", "per sample", "per token"])
def test_int8_gemm_kernel_matches_the_reference(entries, out_dtype, generator, triton_device):
    arguments = layer((78, 130, 333), generator, entries)
    y = dispatch.int8_gemm(**to_device(arguments, triton_device), out_dtype=out_dtype)
    assert y.dtype == out_dtype
    assert relative_error(y, expected_float64(arguments)) <= TOLERANCE[out_dtype]
    if out_dtype == torch.float32:  # the interpreter truncates to bf16 where a GPU rounds, so others differ
        assert relative_error(y, int8_gemm_ref(**arguments, out_dtype=out_dtype)) <= 1e-6


def test_int8_gemm_kernel_takes_strided_codes_and_no_bias(generator, triton_device):
    arguments = to_device(layer((40, 64, 128), generator, asymmetric=False), triton_device)
    a = arguments["activation"]
    rows = QuantizedActivation(a.codes[::2], a.scale, None, 20)
    columns = QuantizedActivation(a.codes.t().contiguous().t(), a.scale, None, 40)
    arguments["bias"] = None
    whole = dispatch.int8_gemm(**arguments, out_dtype=torch.float32)
    assert torch.equal(dispatch.int8_gemm(**arguments | {"activation": rows}, out_dtype=torch.float32), whole[::2])
    assert torch.equal(dispatch.int8_gemm(**arguments | {"activation": columns}, out_dtype=torch.float32), whole)


def test_int8_gemm_result_is_nan_in_the_row_that_was_not_finite(generator, triton_device):
    x = torch.randn(20, 64, generator=generator)
    x[4, 9] = float("nan")
    arguments = layer((20, 32, 64), generator, asymmetric=False) | {"activation": quantize_token_ref(x)}
    y = dispatch.int8_gemm(**to_device(arguments, triton_device))
    assert y.isnan().any(1).nonzero().flatten().tolist() == [4]
    assert y[4].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(32, 65, dtype=torch.int8)}, r"\(32, 65\) for 64 terms"),
        ({"qweight": torch.zeros(32, 64)}, "float32"),
        ({"bias": torch.zeros(31)}, r"bias of shape \(31,\); \(32,\) is needed"),
        ({"weight_sum": None}, "zero point without weight_sum"),
    ],
    ids=["K differs", "float weight", "short bias", "no weight_sum"],
)
def test_int8_gemm_refuses_operands_that_do_not_fit(change, message, generator):
    with pytest.raises(LayoutError, match=message):
        int8_gemm_ref(**layer((20, 32, 64), generator) | change)


def test_int8_gemm_refuses_an_activation_whose_scales_do_not_cover_its_rows():
    with pytest.raises(LayoutError, match="3 entries of 5 rows for 16 rows"):
        QuantizedActivation(torch.zeros(16, 64, dtype=torch.int8), torch.ones(3), None, 5)
