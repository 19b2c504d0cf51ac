"""quantize_joined: the reference is quantization of the concatenation; the kernels against the reference and float64."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import LayoutError
from stepquant.kernels import dispatch
from stepquant.kernels.quantize_joined import quantize_joined_ref
from stepquant.kernels.quantize_token import quantize_token_ref
from stepquant.kernels.static_scale import StaticScale

# B, H, W, channels of both: SDXL's kind of widths, and widths that fill no block.
SHAPES = [(2, 8, 8, 64, 64), (1, 4, 6, 320, 64), (2, 5, 7, 40, 24), (1, 1, 1, 1, 3), (3, 3, 2, 96, 160)]


def images(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    B, H, W, *widths = shape
    return [(5 * i + 1) * torch.randn(B, C, H, W, generator=generator).to(dtype) for i, C in enumerate(widths)]


def static(asymmetric: bool, bucket: torch.Tensor, device: torch.device | str = "cpu", counted: bool = False) -> StaticScale:
    zero_point = torch.linspace(-20, 30, 64).int().to(device) if asymmetric else None
    clipped = torch.zeros(2, dtype=torch.int32, device=device) if counted else None
    return StaticScale(torch.linspace(0.02, 0.06, 64, device=device), zero_point, bucket.to(device), clipped)


def assert_close(actual, expected, apart_at_most: float) -> None:
    apart = (actual.codes.cpu().int() - expected.codes.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() <= apart_at_most
    assert torch.equal(actual.scale.cpu().nan_to_num(-1.0), expected.scale.nan_to_num(-1.0))
    assert (actual.zero_point is None) == (expected.zero_point is None)
    assert actual.zero_point is None or torch.equal(actual.zero_point.cpu(), expected.zero_point)
    assert actual.rows_per_scale == expected.rows_per_scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_joined_reference_matches_float64(shape, generator):
    first, second = images(shape, generator)
    rows = torch.cat((first, second), 1).double().permute(0, 2, 3, 1).flatten(0, 2)
    activation = quantize_joined_ref(first, second)
    assert ((activation.dequantize(torch.float64) - rows).abs() <= 0.51 * activation.scale.double()[:, None]).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        *((shape, torch.float16, torch.channels_last) for shape in SHAPES),
        (SHAPES[2], torch.bfloat16, torch.contiguous_format),
        (SHAPES[2], torch.float32, torch.contiguous_format),
    ],
    ids=str,
)
def test_quantize_joined_kernel_equals_the_reference_per_pixel(shape, dtype, layout, generator, triton_device):
    first, second = images(shape, generator, dtype)
    before = first.clone()
    actual = dispatch.quantize_joined(first.to(triton_device, memory_format=layout), second.to(triton_device))
    assert_close(actual, quantize_joined_ref(first, second), 0.0)
    assert torch.equal(first, before)


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_joined_kernel_equals_the_reference_with_stored_scales_and_counts(shape, asymmetric, generator, triton_device):
    first, second = images(shape, generator)
    bucket = torch.tensor([60, 3, 17][: shape[0]])
    expected_scale, scale = static(asymmetric, bucket, counted=True), static(asymmetric, bucket, triton_device, counted=True)
    channels_last = [x.to(triton_device, memory_format=torch.channels_last) for x in (first, second)]
    actual = dispatch.quantize_joined(*channels_last, scale)
    assert_close(actual, quantize_joined_ref(first, second, expected_scale), 1e-4)
    assert scale.clipped.tolist() == expected_scale.clipped.tolist()
    assert expected_scale.clipped[0] > 0 or shape[3] == 1


def test_quantize_joined_is_what_quantizing_the_concatenation_gives(generator, triton_device):
    first, second = images((2, 4, 4, 128, 64), generator)
    joined = torch.cat((first, second), 1).permute(0, 2, 3, 1).flatten(0, 2)
    actual = dispatch.quantize_joined(first.to(triton_device), second.to(triton_device))
    assert_close(actual, quantize_token_ref(joined), 0.0)


def test_quantize_joined_marks_a_pixel_that_is_not_finite_in_either_image(generator, triton_device):
    first, second = images((1, 2, 3, 32, 64), generator)
    first[0, 5, 0, 1], second[0, 63, 1, 2] = float("nan"), float("inf")
    expected = quantize_joined_ref(first, second)
    assert expected.scale.isnan().tolist() == [False, True, False, False, False, True]
    assert_close(dispatch.quantize_joined(first.to(triton_device), second.to(triton_device)), expected, 0.0)


def test_quantize_joined_refuses_what_does_not_fit(generator):
    first, second = images((2, 4, 4, 8, 8), generator)
    with pytest.raises(LayoutError, match="one batch and size"):
        quantize_joined_ref(first, second[:, :, :2])
    with pytest.raises(LayoutError, match="one batch and size"):
        quantize_joined_ref(first, second[:1])
    with pytest.raises(LayoutError, match="3 buckets for 2 images"):
        quantize_joined_ref(first, second, static(False, torch.tensor([1, 2, 3])))
