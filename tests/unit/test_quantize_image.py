"""quantize_image: the reference against float64, the kernel against the reference, for every memory layout."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from stepquant.errors import LayoutError
from stepquant.kernels import dispatch
from stepquant.kernels.group_norm_silu_quantize import SILU_DIP_DEPTH
from stepquant.kernels.quantize_image import quantize_image_ref
from stepquant.quant.layers import SILU_LOW

LOW = -SILU_DIP_DEPTH
SHAPES = [(1, 64, 8, 8), (2, 20, 5, 7), (3, 130, 1, 4), (2, 33, 9, 1), (1, 320, 16, 16)]


def images(shape: tuple[int, ...], layout: str, generator: torch.Generator, device: torch.device | str = "cpu") -> torch.Tensor:
    """fp16 images of different magnitude in one of three memory layouts."""
    B, C, H, W = shape
    x = torch.randn(B, C, H + 3, W + 2, generator=generator) * torch.arange(1, B + 1).view(-1, 1, 1, 1)
    x = x.half().to(device)
    if layout == "crop":
        return x[:, :, 1 : H + 1, 2:]
    x = x[:, :, :H, :W]
    return x.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


def after_silu(shape: tuple[int, ...], layout: str, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return functional.silu(images(shape, layout, torch.Generator().manual_seed(seed), device))


def assert_same(actual, expected) -> None:
    assert (actual.zero_point is None) == (expected.zero_point is None)
    assert actual.zero_point is None or torch.equal(actual.zero_point.cpu(), expected.zero_point)
    assert torch.equal(actual.codes.cpu(), expected.codes)
    assert torch.equal(actual.scale.cpu().nan_to_num(-1.0), expected.scale.nan_to_num(-1.0))
    assert actual.codes.is_contiguous()
    assert actual.rows_per_scale == expected.rows_per_scale


def test_layers_and_kernels_mean_the_same_lowest_value():
    """Neither package may import the other; fused blocks take the kernels' value, single layers the other."""
    assert SILU_LOW == -SILU_DIP_DEPTH


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_image_reference_matches_float64(shape, generator):
    x = images(shape, "nchw", generator)
    result = quantize_image_ref(x)
    scale = x.double().abs().amax((1, 2, 3)) / 127
    expected = (x.double() / scale.view(-1, 1, 1, 1)).round().permute(0, 2, 3, 1)
    apart = (result.codes.double() - expected).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() <= 1e-3
    torch.testing.assert_close(result.scale.double(), scale, rtol=1e-6, atol=0)
    assert result.rows_per_scale == shape[2] * shape[3]


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "crop"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_image_kernel_equals_the_reference_bit_for_bit(shape, layout, triton_device):
    x = images(shape, layout, torch.Generator().manual_seed(3))
    on_device = images(shape, layout, torch.Generator().manual_seed(3), triton_device)
    assert_same(dispatch.quantize_image(on_device), quantize_image_ref(x))


def test_quantize_image_gives_the_same_codes_for_every_layout(generator):
    x = images((2, 20, 5, 7), "nchw", generator)
    assert_same(quantize_image_ref(x.contiguous(memory_format=torch.channels_last)), quantize_image_ref(x))


def test_quantize_image_marks_an_image_that_is_not_finite_and_no_other(generator, triton_device):
    x = images((3, 20, 5, 7), "nchw", generator)
    x[0, 19, 4, 6] = float("nan")
    x[2] = 0
    result = quantize_image_ref(x)
    assert result.scale.isnan().tolist() == [True, False, False]
    assert result.codes[0].eq(0).all() and result.codes[2].eq(0).all()
    assert_same(dispatch.quantize_image(x.to(triton_device)), result)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_image_above_a_low_end_matches_float64(shape):
    x = after_silu(shape, "nchw", 3)
    result = quantize_image_ref(x, LOW)
    high = x.double().amax((1, 2, 3)).clamp_min(0)
    scale = (high - LOW) / 255
    torch.testing.assert_close(result.scale.double(), scale, rtol=1e-6, atol=0)
    assert torch.equal(result.zero_point.double(), (-LOW / scale).round() - 128)
    exact = (x.double() / scale.view(-1, 1, 1, 1)).round() + result.zero_point.view(-1, 1, 1, 1)
    apart = (result.codes.double() - exact.clamp(-128, 127).permute(0, 2, 3, 1)).abs()
    assert apart.max() <= 1 and (apart > 0).double().mean() <= 1e-3
    # Half a step, and as much again at the ends, where the zero point was rounded.
    error = (result.dequantize(torch.float64).permute(0, 3, 1, 2) - x.double()).abs()
    assert (error <= 1.01 * scale.view(-1, 1, 1, 1)).all()
    assert result.codes.min() >= -128 and result.codes.max() <= 127


def test_quantize_image_above_a_low_end_has_nearly_twice_the_codes_for_silus_outputs():
    x = after_silu((2, 64, 16, 16), "nchw", 3)

    def sqnr_db(result) -> float:
        error = (result.dequantize().permute(0, 3, 1, 2) - x.float()).square().sum()
        return float(10 * (x.float().square().sum() / error).log10())

    assert sqnr_db(quantize_image_ref(x, LOW)) > sqnr_db(quantize_image_ref(x)) + 5


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "crop"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_image_kernel_above_a_low_end_equals_the_reference_bit_for_bit(shape, layout, triton_device):
    expected = quantize_image_ref(after_silu(shape, layout, 3), LOW)
    assert_same(dispatch.quantize_image(after_silu(shape, layout, 3, triton_device), LOW), expected)


def test_quantize_image_above_a_low_end_marks_what_is_not_finite_and_clips_what_is_lower(generator, triton_device):
    x = functional.silu(images((4, 20, 5, 7), "nchw", generator))
    x[0, 19, 4, 6] = float("nan")
    x[1, 0, 0, 0] = -float("inf")
    x[2] = 0
    x[3, 0, 0, 0] = -9.0
    result = quantize_image_ref(x, LOW)
    assert result.scale.isnan().tolist() == [True, True, False, False]
    assert result.codes[:2].eq(0).all() and result.zero_point[:2].eq(0).all()
    assert result.codes[2].eq(127).all() and result.dequantize()[2].eq(0).all()
    assert result.codes[3, 0, 0, 0] == -128
    assert_same(dispatch.quantize_image(x.to(triton_device), LOW), result)


@pytest.mark.parametrize("low", [0.0, 0.5, -float("inf"), float("nan")])
def test_quantize_image_refuses_a_low_end_that_is_not_below_zero(low):
    with pytest.raises(LayoutError, match="a finite number below 0"):
        quantize_image_ref(torch.zeros(1, 2, 3, 4), low)


def test_quantize_image_refuses_what_is_no_batch_of_images():
    with pytest.raises(LayoutError, match=r"\(B, C, H, W\) is needed"):
        quantize_image_ref(torch.zeros(3, 4))
