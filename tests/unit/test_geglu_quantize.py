"""geglu_quantize: the GELU's error, the reference against float64, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import LayoutError
from stepquant.kernels import dispatch
from stepquant.kernels.geglu_quantize import geglu_quantize_ref
from stepquant.kernels.static_scale import StaticScale

SHAPES = [(1, 64), (7, 333), (3, 2560), (5, 3)]  # M, N
MODES = ["token", "symmetric", "asymmetric"]


def rows(M: int, N: int, generator: torch.Generator, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Rows of different magnitude, with gates on both sides of 0 and far out."""
    return (2 * torch.randn(M, 2 * N, generator=generator) * torch.randn(M, 1, generator=generator).exp()).to(dtype)


def static(mode: str, bucket: torch.Tensor, device: torch.device | str = "cpu") -> StaticScale | None:
    if mode == "token":
        return None
    zero_point = torch.linspace(-20, 30, 64).int().to(device) if mode == "asymmetric" else None
    return StaticScale(torch.linspace(0.01, 0.05, 64, device=device), zero_point, bucket.to(device))


def assert_close(actual, expected) -> None:
    """Codes at most 1 apart on at most 0.1 %, scales to the kernel's GELU, zero points equal."""
    apart = (actual.codes.cpu().int() - expected.codes.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() <= 1e-3
    torch.testing.assert_close(actual.scale.cpu(), expected.scale, rtol=3e-5, atol=0, equal_nan=True)
    assert (actual.zero_point is None) == (expected.zero_point is None)
    assert actual.zero_point is None or torch.equal(actual.zero_point.cpu(), expected.zero_point)
    assert actual.rows_per_scale == expected.rows_per_scale


def exact_geglu(x: torch.Tensor) -> torch.Tensor:
    value, gate = x.double().chunk(2, 1)
    return value * gate * torch.special.ndtr(gate)


def kernel_gelu(gates: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The kernel's GELU of each gate: rows of one value 1 and one gate, whose dynamic scale is |gelu| / 127."""
    x = torch.stack([torch.ones_like(gates), gates], 1)
    return dispatch.geglu_quantize(x.to(device)).scale.cpu().double() * 127


def test_geglu_quantize_gelu_is_accurate_to_fp16_rounding(triton_device):
    gates = torch.linspace(-5.5, 5.5, 512)  # no 0
    exact = (gates.double() * torch.special.ndtr(gates.double())).abs()
    error = (kernel_gelu(gates, triton_device) - exact).abs()
    assert (error <= 3e-5 * exact).all()  # fp16 rounds to 4.9e-4
    far = torch.linspace(5.5, 12.0, 64)
    assert (kernel_gelu(far, triton_device) - far.double()).abs().max() <= 1e-6  # fp32 near 12
    assert kernel_gelu(-far, triton_device).max() <= 1.1e-7  # two of fp16's smallest steps


def test_geglu_quantize_follows_the_formula_on_a_worked_example():
    # gelu(0) = 0, gelu(1) = 0.8413447, gelu(-1) = -0.1586553
    activation = geglu_quantize_ref(torch.tensor([[5.0, 2.0, 4.0, 0.0, 1.0, -1.0]]))
    assert activation.scale.tolist() == pytest.approx([2 * 0.8413447 / 127])
    assert activation.codes.tolist() == [[0, 127, -48]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_geglu_quantize_reference_matches_float64(shape, generator):
    x = rows(*shape, generator)
    activation = geglu_quantize_ref(x)
    # 0.51: half a step, and the rounding of fp32.
    apart = (activation.dequantize(torch.float64) - exact_geglu(x)).abs()
    assert (apart <= 0.51 * activation.scale.double()[:, None]).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_geglu_quantize_kernel_equals_the_reference(shape, mode, generator, triton_device):
    x = rows(*shape, generator)
    before, bucket = x.clone(), torch.tensor([7])
    actual = dispatch.geglu_quantize(x.to(triton_device), static(mode, bucket, triton_device))
    assert_close(actual, geglu_quantize_ref(x, static(mode, bucket)))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_geglu_quantize_kernel_equals_the_reference_in_every_dtype_and_when_strided(dtype, generator, triton_device):
    x = rows(8, 90, generator, dtype)
    moved = x.to(triton_device)
    assert_close(dispatch.geglu_quantize(moved[::2, :100]), geglu_quantize_ref(x[::2, :100]))


def test_geglu_quantize_takes_a_batch_of_mixed_timesteps(generator, triton_device):
    x, bucket = rows(6, 40, generator), torch.tensor([3, 60])
    actual = dispatch.geglu_quantize(x.to(triton_device), static("asymmetric", bucket, triton_device))
    assert actual.rows_per_scale == 3
    assert_close(actual, geglu_quantize_ref(x, static("asymmetric", bucket)))


def test_geglu_quantize_marks_a_row_that_is_not_finite_and_no_other(generator, triton_device):
    x = rows(4, 77, generator, torch.float32)
    x[1, 70], x[2, 80], x[3] = float("nan"), float("nan"), 0.0
    expected = geglu_quantize_ref(x)
    assert expected.scale.isnan().tolist() == [False, True, True, False]
    assert_close(dispatch.geglu_quantize(x.to(triton_device)), expected)


def test_geglu_quantize_refuses_rows_without_two_halves():
    with pytest.raises(LayoutError, match="rows of 7 values; an even number"):
        geglu_quantize_ref(torch.zeros(2, 7))
    with pytest.raises(LayoutError, match="3 buckets for 4 images or rows"):
        geglu_quantize_ref(torch.zeros(4, 8), static("symmetric", torch.tensor([1, 2, 3])))
