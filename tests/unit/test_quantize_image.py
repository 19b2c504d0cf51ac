"""quantize_image: the reference against float64, the kernel against the reference, for every memory layout."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import LayoutError
from stepquant.kernels import dispatch
from stepquant.kernels.quantize_image import quantize_image_ref

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


def assert_same(actual, expected) -> None:
    assert torch.equal(actual.codes.cpu(), expected.codes)
    assert torch.equal(actual.scale.cpu().nan_to_num(-1.0), expected.scale.nan_to_num(-1.0))
    assert actual.codes.is_contiguous()
    assert actual.rows_per_scale == expected.rows_per_scale


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


def test_quantize_image_refuses_what_is_no_batch_of_images():
    with pytest.raises(LayoutError, match=r"\(B, C, H, W\) is needed"):
        quantize_image_ref(torch.zeros(3, 4))
