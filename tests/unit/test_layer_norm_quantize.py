"""layer_norm_quantize: the formula by hand, the reference against float64, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from stepquant.errors import LayoutError
from stepquant.kernels import dispatch
from stepquant.kernels.layer_norm_quantize import layer_norm_quantize_ref
from stepquant.kernels.quantize_token import quantize_token_ref
from stepquant.kernels.static_scale import StaticScale

# Infinities minus their mean: NumPy, which the interpreter runs on, warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
SHAPES = [(1, 64), (7, 333), (4, 1280), (3, 640), (5, 1)]
MODES = ["token", "symmetric", "asymmetric"]


def operands(shape: tuple[int, int], generator: torch.Generator, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, ...]:
    """Rows of different mean and magnitude with an outlier each, weight and bias of a trained norm's size."""
    M, K = shape
    x = torch.randn(shape, generator=generator) * torch.randn(M, 1, generator=generator).exp() + torch.randn(M, 1, generator=generator)
    x[:, K // 3] *= 30
    weight, bias = torch.randn(2, K, generator=generator)
    return x.to(dtype), (1 + 0.3 * weight).to(dtype), (0.2 * bias).to(dtype)


def static(mode: str, bucket: torch.Tensor, device: torch.device | str = "cpu") -> StaticScale | None:
    if mode == "token":
        return None
    zero_point = torch.linspace(-20, 30, 64).int().to(device) if mode == "asymmetric" else None
    return StaticScale(torch.linspace(0.01, 0.05, 64, device=device), zero_point, bucket.to(device))


def assert_close(actual, expected) -> None:
    """Codes at most 1 apart on at most 0.1 %, scales to the rounding of fp32 sums, zero points equal."""
    apart = (actual.codes.cpu().int() - expected.codes.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() <= 1e-3
    torch.testing.assert_close(actual.scale.cpu(), expected.scale, rtol=2e-6, atol=0, equal_nan=True)
    assert (actual.zero_point is None) == (expected.zero_point is None)
    assert actual.zero_point is None or torch.equal(actual.zero_point.cpu(), expected.zero_point)
    assert actual.rows_per_scale == expected.rows_per_scale


def test_layer_norm_quantize_follows_the_formula_on_a_worked_example():
    x = torch.tensor([[-1.0, 1.0, -1.0, 1.0]])  # mean 0, variance 1
    weight, bias = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])  # y = -1, 3, -3, 4
    activation, y = layer_norm_quantize_ref(x, weight, bias, eps=0.0, keep_float=True)
    assert y.tolist() == [[-1.0, 3.0, -3.0, 4.0]]
    assert activation.codes.tolist() == [[-32, 95, -95, 127]]
    assert activation.scale.tolist() == pytest.approx([4 / 127])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_quantize_reference_matches_float64(shape, generator):
    x, weight, bias = operands(shape, generator)
    activation, y = layer_norm_quantize_ref(x, weight, bias, keep_float=True)
    exact = functional.layer_norm(x.double(), (shape[1],), weight.double(), bias.double(), 1e-5)
    assert y.dtype == x.dtype
    assert (y.double() - exact).norm() <= 5e-4 * exact.norm()
    # 0.51: half a step, and the rounding of fp32.
    assert ((activation.dequantize(torch.float64) - exact).abs() <= 0.51 * activation.scale.double()[:, None]).all()


def test_layer_norm_quantize_is_the_norm_then_quantize_when_nothing_is_rounded_between(generator):
    x, weight, bias = operands((6, 320), generator, torch.float32)
    fused, _ = layer_norm_quantize_ref(x, weight, bias)
    separate = quantize_token_ref(functional.layer_norm(x, (320,), weight, bias, 1e-5))
    assert torch.equal(fused.codes, separate.codes) and torch.equal(fused.scale, separate.scale)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_quantize_kernel_equals_the_reference(shape, mode, generator, triton_device):
    x, weight, bias = operands(shape, generator)
    before, bucket = x.clone(), torch.tensor([7])
    expected, expected_y = layer_norm_quantize_ref(x, weight, bias, 1e-5, static(mode, bucket), keep_float=True)
    on_device = [tensor.to(triton_device) for tensor in (x, weight, bias)]
    actual, y = dispatch.layer_norm_quantize(*on_device, 1e-5, static(mode, bucket, triton_device), keep_float=True)
    assert_close(actual, expected)
    assert (y.cpu().double() - expected_y.double()).norm() <= 5e-4 * expected_y.double().norm()
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layer_norm_quantize_kernel_equals_the_reference_in_every_dtype(dtype, generator, triton_device):
    x, weight, bias = operands((4, 77), generator, dtype)
    actual, y = dispatch.layer_norm_quantize(x.to(triton_device), weight.to(triton_device), bias.to(triton_device))
    assert y is None
    assert_close(actual, layer_norm_quantize_ref(x, weight, bias)[0])


def test_layer_norm_quantize_takes_a_batch_of_mixed_timesteps_and_tells_the_consumer_its_scales(generator, triton_device):
    x, weight, bias = operands((12, 80), generator)
    bucket = torch.tensor([3, 60, 3])
    expected, _ = layer_norm_quantize_ref(x, weight, bias, static=static("asymmetric", bucket))
    on_device = [tensor.to(triton_device) for tensor in (x, weight, bias)]
    actual, _ = dispatch.layer_norm_quantize(*on_device, static=static("asymmetric", bucket, triton_device))
    assert actual.scale.numel() == 3 and actual.rows_per_scale == 4
    assert_close(actual, expected)


def test_layer_norm_quantize_kernel_keeps_the_variance_when_the_mean_is_large(generator, triton_device):
    x = 1000 + torch.randn(4, 320, generator=generator)  # a sum of squares in fp32 would leave 1 digit of the variance
    weight, bias = torch.ones(320), torch.zeros(320)
    _, y = dispatch.layer_norm_quantize(x.to(triton_device), weight.to(triton_device), bias.to(triton_device), keep_float=True)
    exact = functional.layer_norm(x.double(), (320,))
    assert (y.cpu().double() - exact).norm() <= 1e-4 * exact.norm()


def test_layer_norm_quantize_kernel_takes_strided_rows(generator, triton_device):
    x, weight, bias = operands((6, 200), generator)
    for view in (x[::2, :100], x[:, 50:150], x[:, ::2]):
        expected, _ = layer_norm_quantize_ref(view, weight[:100], bias[:100])
        moved = x.to(triton_device).as_strided(view.shape, view.stride(), view.storage_offset())
        actual, _ = dispatch.layer_norm_quantize(moved, weight[:100].to(triton_device), bias[:100].to(triton_device))
        assert_close(actual, expected)


@pytest.mark.parametrize("mode", ["token", "asymmetric"])
def test_layer_norm_quantize_marks_a_row_that_is_not_finite_and_no_other(mode, generator, triton_device):
    x, weight, bias = operands((5, 77), generator, torch.float32)
    x[1, 70], x[3, 0], x[4] = float("nan"), float("inf"), 0.0
    expected, _ = layer_norm_quantize_ref(x, weight, bias, static=static(mode, torch.tensor([5])))
    if mode == "token":
        assert expected.scale.isnan().tolist() == [False, True, False, True, False]
        assert expected.codes[1].eq(0).all() and expected.codes[3].eq(0).all()
    on_device = [tensor.to(triton_device) for tensor in (x, weight, bias)]
    actual, _ = dispatch.layer_norm_quantize(*on_device, static=static(mode, torch.tensor([5]), triton_device))
    assert_close(actual, expected)


def test_layer_norm_quantize_refuses_what_does_not_fit():
    x, vector = torch.zeros(6, 8), torch.zeros(8)
    with pytest.raises(LayoutError, match=r"weight of shape \(7,\); \(8,\) is needed"):
        layer_norm_quantize_ref(x, torch.zeros(7), vector)
    with pytest.raises(LayoutError, match="rows of 9000 values; 1 to 8192"):
        layer_norm_quantize_ref(torch.zeros(1, 9000), torch.zeros(9000), torch.zeros(9000))
    with pytest.raises(LayoutError, match="4 buckets for 6 images or rows"):
        layer_norm_quantize_ref(x, vector, vector, static=static("symmetric", torch.tensor([1, 2, 3, 4])))
    with pytest.raises(LayoutError, match=r"static scale: shape \(8,\); \(64,\)"):
        StaticScale(vector, None, torch.tensor([1]))
