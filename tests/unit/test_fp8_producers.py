"""What writes fp8 codes: kernels against the references, references against float64, and the products that end in codes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from stepquant.errors import LayoutError
from stepquant.kernels import dispatch
from stepquant.kernels.activation import FP8, QuantizedActivation
from stepquant.kernels.fp8_geglu_gemm import fp8_geglu_gemm_ref
from stepquant.kernels.fp8_gemm_many import fp8_gemm_many_ref
from stepquant.kernels.geglu_quantize import geglu_quantize_ref
from stepquant.kernels.group_norm_silu_quantize import DynamicScale, group_norm_silu_quantize_ref
from stepquant.kernels.layer_norm_quantize import layer_norm_quantize_ref
from stepquant.kernels.quantize_image import quantize_image_ref
from stepquant.kernels.quantize_token import quantize_token_ref
from stepquant.kernels.static_scale import StaticScale
from stepquant.quant.sqnr import sqnr_db

# e4m3's rounding of normally distributed values: 31.6 dB measured.
FP8_DB = 31
IMAGES = [(2, 64, 6, 10), (1, 96, 5, 3)]


def values(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * 3


def norms(channels: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(channels, generator=generator) + 0.5, torch.randn(channels, generator=generator)


def same_codes(actual: QuantizedActivation, expected: QuantizedActivation, exact: bool) -> None:
    """Bit for bit, or scales to fp32 rounding and fewer than 1 code in 100 another neighbour."""
    assert actual.codes.dtype is expected.codes.dtype is FP8
    assert actual.rows_per_scale == expected.rows_per_scale
    differ = actual.codes.cpu().float() != expected.codes.float()  # 0 and -0 are one value
    if exact:
        assert torch.equal(actual.scale.cpu(), expected.scale)
    torch.testing.assert_close(actual.scale.cpu(), expected.scale, rtol=5e-5, atol=0)
    assert float(differ.float().mean()) <= (0 if exact else 1e-2)
    assert sqnr_db(expected.dequantize(), actual.dequantize().cpu()) > 50


@pytest.mark.parametrize("shape", [(33, 320), (7, 77), (3, 8200)], ids=str)
def test_quantize_token_to_fp8_is_the_reference_bit_for_bit(shape, generator, triton_device):
    x = values(shape, generator) * torch.rand(shape[0], 1, generator=generator)
    expected = quantize_token_ref(x, FP8)
    assert sqnr_db(x, expected.dequantize()) > FP8_DB
    same_codes(dispatch.quantize_token(x.to(triton_device), FP8), expected, exact=True)


def test_quantize_token_to_fp8_reaches_448_and_rounds_to_the_nearest_even():
    x = torch.tensor([[448.0, 17.0, 19.0, -464.0 * 448 / 465, 2.0**-10, 3 * 2.0**-10, 0.0]])
    activation = quantize_token_ref(x, FP8)
    assert activation.codes.float().tolist() == [[448.0, 16.0, 20.0, -448.0, 0.0, 2.0**-8, 0.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_quantize_token_to_fp8_marks_a_row_that_is_not_finite(bad, generator, triton_device):
    x = values((4, 64), generator)
    x[2, 5] = bad
    activation = dispatch.quantize_token(x.to(triton_device), FP8)
    assert activation.scale.isnan().tolist() == [False, False, True, False]
    assert bool((activation.codes[2].float() == 0).all())


@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_quantize_image_to_fp8_is_the_reference_bit_for_bit(shape, generator, triton_device):
    x = values(shape, generator)
    expected = quantize_image_ref(x, None, FP8)
    assert sqnr_db(x.permute(0, 2, 3, 1), expected.dequantize()) > FP8_DB
    same_codes(dispatch.quantize_image(x.to(triton_device), None, FP8), expected, exact=True)


@pytest.mark.parametrize("shape", [(33, 320), (5, 78)], ids=str)
def test_layer_norm_to_fp8_matches_float64_and_the_kernel_the_reference(shape, generator, triton_device):
    x, (weight, bias) = values(shape, generator), norms(shape[1], generator)
    expected, y = layer_norm_quantize_ref(x, weight, bias, keep_float=True, dtype=FP8)
    exact = functional.layer_norm(x.double(), (shape[1],), weight.double(), bias.double())
    assert sqnr_db(exact, expected.dequantize().double()) > FP8_DB
    operands = [tensor.to(triton_device) for tensor in (x, weight, bias)]
    actual, kept = dispatch.layer_norm_quantize(*operands, keep_float=True, dtype=FP8)
    same_codes(actual, expected, exact=False)
    torch.testing.assert_close(kept.cpu(), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize(("silu", "dynamic"), [(True, DynamicScale.IMAGE), (False, DynamicScale.TOKEN)], ids=["silu image", "token"])
def test_group_norm_to_fp8_matches_float64_and_the_kernel_the_reference(shape, silu, dynamic, generator, triton_device):
    x, (weight, bias) = values(shape, generator), norms(shape[1], generator)
    (expected,) = group_norm_silu_quantize_ref([x], weight, bias, 1e-5, silu, (), dynamic, dtype=FP8)
    exact = functional.group_norm(x.double(), 32, weight.double(), bias.double())
    exact = functional.silu(exact) if silu else exact
    assert sqnr_db(exact.permute(0, 2, 3, 1), expected.dequantize().double()) > FP8_DB
    x, weight, bias = (tensor.to(triton_device) for tensor in (x, weight, bias))
    (actual,) = dispatch.group_norm_silu_quantize([x], weight, bias, 1e-5, silu, (), dynamic, dtype=FP8)
    same_codes(actual, expected, exact=False)


@pytest.mark.parametrize("shape", [(33, 640), (5, 76)], ids=str)
def test_geglu_to_fp8_matches_float64_and_the_kernel_the_reference(shape, generator, triton_device):
    x = values(shape, generator)
    expected = geglu_quantize_ref(x, None, FP8)
    value, gate = x.double().chunk(2, 1)
    assert sqnr_db(value * functional.gelu(gate), expected.dequantize().double()) > FP8_DB
    same_codes(dispatch.geglu_quantize(x.to(triton_device), None, FP8), expected, exact=False)


def weight(N: int, K: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, None, torch.Tensor]:
    return (values((N, K), generator) * 10).to(FP8), torch.rand(N, generator=generator) * 1e-2, None, torch.randn(N, generator=generator)


def moved(operands, device):
    return [None if operand is None else operand.to(device) for operand in operands]


def float64_product(activation: QuantizedActivation, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    rows = activation.codes.double() * activation.scale.double()[:, None]
    return rows @ (codes.double() * scale.double()[:, None]).t() + bias.double()


def activation_on(activation: QuantizedActivation, device) -> QuantizedActivation:
    return QuantizedActivation(activation.codes.to(device), activation.scale.to(device), None, activation.rows_per_scale)


@pytest.fixture
def least_db(triton_device):
    """Hopper's tensor cores sum fp8 products with about 14 bits of mantissa; the interpreter sums in fp32."""
    return 46 if triton_device.type == "cuda" else 100


@pytest.mark.parametrize(("M", "N", "K"), [(70, 128, 96), (33, 72, 64)], ids=str)
def test_fp8_gemm_many_matches_float64(M, N, K, generator, triton_device, least_db):
    activation = quantize_token_ref(values((M, K), generator), FP8)
    weights = [weight(N, K, generator) for _ in range(3)]
    exact = [float64_product(activation, codes, scale, bias) for codes, scale, _, bias in weights]
    results = [fp8_gemm_many_ref(activation, weights, torch.float32)]
    on_device = [moved(one, triton_device) for one in weights]
    results.append(dispatch.fp8_gemm_many(activation_on(activation, triton_device), on_device, torch.float32))
    for result, least in zip(results, (100, least_db), strict=True):
        assert min(sqnr_db(y, one.cpu().double()) for y, one in zip(exact, result, strict=True)) > least


@pytest.mark.parametrize(("M", "N", "K"), [(70, 128, 96), (33, 72, 64)], ids=str)
def test_fp8_geglu_gemm_matches_float64_up_to_its_codes(M, N, K, generator, triton_device):
    activation = quantize_token_ref(values((M, K), generator), FP8)
    codes, scale, _, bias = weight(N, K, generator)
    value, gate = float64_product(activation, codes, scale, bias).chunk(2, 1)
    exact = value * functional.gelu(gate)
    expected = fp8_geglu_gemm_ref(activation, codes, scale, bias)
    actual = dispatch.fp8_geglu_gemm(activation_on(activation, triton_device), *moved((codes, scale, bias), triton_device))
    for result in (expected, actual):
        assert result.codes.dtype is FP8
        assert result.codes.shape == (M, N // 2)
        assert sqnr_db(exact, result.dequantize().cpu().double()) > FP8_DB


def test_fp8_products_of_many_refuse_what_does_not_fit(generator):
    activation = quantize_token_ref(values((8, 64), generator), FP8)
    with pytest.raises(LayoutError, match="fp8_gemm_many: 2 weights of shapes"):
        fp8_gemm_many_ref(activation, [weight(16, 64, generator), weight(24, 64, generator)])
    codes, scale, _, bias = weight(17, 64, generator)
    with pytest.raises(LayoutError, match="an even number, values before gates"):
        fp8_geglu_gemm_ref(activation, codes, scale, bias)


def test_producers_refuse_stored_scales_and_zero_points_for_fp8(generator):
    static = StaticScale(torch.ones(64), None, torch.zeros(1, dtype=torch.int64))
    x, (scale, bias) = values((8, 64), generator), norms(64, generator)
    for refused in (
        lambda: layer_norm_quantize_ref(x, scale, bias, static=static, dtype=FP8),
        lambda: geglu_quantize_ref(x, static, FP8),
        lambda: group_norm_silu_quantize_ref([x.view(2, 64, 2, 2)], scale, bias, static=(static,), dtype=FP8),
        lambda: group_norm_silu_quantize_ref([x.view(2, 64, 2, 2)], scale, bias, dynamic=DynamicScale.SILU_IMAGE, dtype=FP8),
        lambda: quantize_image_ref(x.view(2, 64, 2, 2), -0.25, FP8),
    ):
        with pytest.raises(LayoutError, match="float8_e4m3fn codes"):
            refused()
