"""quantize_token: the formula by hand, the reference against float64, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import LayoutError
from stepquant.kernels import dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.quantize_token import quantize_token_ref

# Rows with warps of their own and rows that share one, some not a multiple of a tile
SHAPES = [(1, 64), (77, 333), (64, 1280), (24, 640), (6, 77)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def rows(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Normal rows whose magnitudes differ by orders, each with one outlier."""
    x = torch.randn(shape, generator=generator) * torch.randn(shape[0], 1, generator=generator).exp()
    x[:, shape[1] // 3] *= 50
    return x.to(dtype)


def assert_same(actual, expected) -> None:
    assert torch.equal(actual.codes.cpu(), expected.codes)
    assert torch.equal(actual.scale.cpu().nan_to_num(-1.0), expected.scale.nan_to_num(-1.0))
    assert actual.zero_point is None
    assert actual.rows_per_scale == expected.rows_per_scale


def test_quantize_token_follows_the_formula_on_a_worked_example():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0, 2.54, -2.54, 1.27, 0.02, 0.01]])
    result = quantize_token_ref(x)
    assert result.codes.tolist() == [[127, 0, 2, 2, 0, -2], [0, 127, -127, 64, 1, 0]]
    assert result.scale.tolist() == pytest.approx([1.0, 0.02])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_token_reference_matches_float64(shape, dtype, generator):
    x = rows(shape, dtype, generator)
    result = quantize_token_ref(x)
    scale = x.double().abs().amax(1) / 127
    expected = (x.double() / scale[:, None]).round()
    apart = (result.codes.double() - expected).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() <= 1e-3
    torch.testing.assert_close(result.scale.double(), scale, rtol=1e-6, atol=0)
    # 0.51: half a step, and the rounding of fp32.
    assert ((result.dequantize(torch.float64) - x.double()).abs() <= 0.51 * scale[:, None]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_token_kernel_equals_the_reference_bit_for_bit(shape, dtype, generator, triton_device):
    x = rows(shape, dtype, generator)
    assert_same(dispatch.quantize_token(x.to(triton_device)), quantize_token_ref(x))


def test_quantize_token_kernel_equals_the_reference_when_rows_are_longer_than_a_block(generator, triton_device):
    x = rows((3, 5120), torch.float16, generator)
    assert_same(dispatch.quantize_token(x.to(triton_device)), quantize_token_ref(x))


def test_quantize_token_kernel_equals_the_reference_when_strided(generator, triton_device):
    x = rows((66, 77), torch.float32, generator)
    for view in (x.t(), x[::2, 1:]):
        before = view.clone()
        device_view = x.to(triton_device).t() if view.shape == (77, 66) else x.to(triton_device)[::2, 1:]
        assert_same(dispatch.quantize_token(device_view), quantize_token_ref(view))
        assert torch.equal(view, before)


def test_quantize_token_gives_zeros_for_a_row_of_zeros(triton_device):
    x = torch.zeros(3, 64)
    x[1, 5] = 1e-3
    assert quantize_token_ref(x).codes[0].eq(0).all()
    assert quantize_token_ref(x).dequantize()[0].eq(0).all()
    assert_same(dispatch.quantize_token(x.to(triton_device)), quantize_token_ref(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_quantize_token_marks_a_row_that_is_not_finite_and_only_that_row(value, generator, triton_device):
    x = rows((5, 333), torch.float32, generator)
    x[2, 330] = value
    result = quantize_token_ref(x)
    assert result.scale.isnan().tolist() == [False, False, True, False, False]
    assert result.codes[2].eq(0).all()
    assert_same(dispatch.quantize_token(x.to(triton_device)), result)


def test_quantize_token_refuses_what_is_no_matrix_of_floats():
    with pytest.raises(LayoutError, match=r"\(2, 3, 4\).*\(M, K\) is needed"):
        quantize_token_ref(torch.zeros(2, 3, 4))
    with pytest.raises(LayoutError, match="int8"):
        quantize_token_ref(torch.zeros(3, 4, dtype=torch.int8))


def test_quantize_token_writes_into_rows_of_a_larger_tensor(generator, triton_device):
    x = torch.randn(6, 40, generator=generator)
    wanted = quantize_token_ref(x)
    for device in {torch.device("cpu"), triton_device}:
        whole = QuantizedActivation(torch.zeros(6, 40, dtype=torch.int8, device=device), torch.zeros(6, device=device), None, 1)
        on_device = x.to(device)
        for function in (quantize_token_ref, dispatch.quantize_token):
            whole.codes.zero_()
            for first, last in ((0, 4), (4, 6)):
                part = whole.part(first, last)
                assert function(on_device[first:last], torch.int8, part).codes.data_ptr() == part.codes.data_ptr()
            assert_same(whole, wanted)
            with pytest.raises(LayoutError, match="into has"):
                function(on_device, torch.int8, whole.part(0, 5))
