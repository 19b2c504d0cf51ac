"""int8_pixel_conv2d and quantize_pixel: references against float64, kernels against references, borders, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from stepquant.errors import LayoutError
from stepquant.kernels import dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.int8_conv2d import border_sums, int8_conv2d_ref
from stepquant.kernels.int8_pixel_conv2d import int8_pixel_conv2d_ref
from stepquant.kernels.quantize_image import quantize_image_ref
from stepquant.kernels.quantize_pixel import quantize_pixel_ref

LOW = -0.2784645427610738
SHAPES = [(1, 6, 6, 64, 32), (2, 5, 7, 20, 18), (1, 1, 9, 130, 70), (1, 3, 1, 33, 5)]  # B, H, W, Cin, Cout


def codes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def operands(shape: tuple[int, ...], generator: torch.Generator, asymmetric: bool = True) -> dict:
    B, H, W, Cin, Cout = shape
    pixels, qweight = B * H * W, codes((Cout, 3, 3, Cin), generator)
    zero_point = torch.randint(-128, 128, (pixels,), generator=generator, dtype=torch.int32) if asymmetric else None
    return {
        "activation": QuantizedActivation(codes((B, H, W, Cin), generator), torch.rand(pixels, generator=generator) * 0.01, zero_point, 1),
        "qweight": qweight,
        "weight_scale": torch.rand(Cout, generator=generator) * 0.001 + 0.0001,
        "border_sums": border_sums(qweight) if asymmetric else None,
        "bias": torch.randn(Cout, generator=generator),
    }


def to_device(arguments: dict, device: torch.device) -> dict:
    a = arguments["activation"]
    zero_point = None if a.zero_point is None else a.zero_point.to(device)
    moved = {name: value.to(device) for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    return {**arguments, **moved, "activation": QuantizedActivation(a.codes.to(device), a.scale.to(device), zero_point, 1)}


def expected_float64(arguments: dict, stride: int) -> torch.Tensor:
    a = arguments["activation"]
    x = a.codes.double().flatten(0, 2)
    x = x if a.zero_point is None else x - a.zero_point[:, None]
    x = (x * a.scale.double()[:, None]).view(a.codes.shape).permute(0, 3, 1, 2)
    weight = (arguments["qweight"].double() * arguments["weight_scale"].double().view(-1, 1, 1, 1)).permute(0, 3, 1, 2)
    return functional.conv2d(x, weight, arguments["bias"].double(), stride, 1)


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_pixel_conv2d_matches_float64(shape, stride, asymmetric, generator, triton_device):
    arguments = operands(shape, generator, asymmetric)
    expected = expected_float64(arguments, stride)
    reference = int8_pixel_conv2d_ref(**arguments, stride=stride, out_dtype=torch.float32)
    actual = dispatch.int8_pixel_conv2d(**to_device(arguments, triton_device), stride=stride, out_dtype=torch.float32)
    for y in (reference, actual.cpu()):
        assert y.shape == expected.shape and y.is_contiguous(memory_format=torch.channels_last)
        assert float((y.double() - expected).norm() / expected.norm()) <= 5e-6


def test_int8_pixel_conv2d_of_zeros_is_the_bias_up_to_the_border_whatever_the_zero_points(generator, triton_device):
    arguments = operands((1, 4, 3, 20, 18), generator)
    a = arguments["activation"]
    zeros = a.zero_point.to(torch.int8)[:, None].expand(-1, 20).reshape(a.codes.shape).contiguous()
    arguments["activation"] = QuantizedActivation(zeros, a.scale, a.zero_point, 1)
    y = dispatch.int8_pixel_conv2d(**to_device(arguments, triton_device), out_dtype=torch.float32).cpu()
    torch.testing.assert_close(y, arguments["bias"].view(1, -1, 1, 1).expand_as(y), rtol=1e-6, atol=1e-6)


def test_int8_pixel_conv2d_makes_a_pixel_that_is_nan_nan_around_it_and_nowhere_else(generator, triton_device):
    arguments = operands((1, 5, 5, 20, 18), generator, asymmetric=False)
    arguments["activation"].scale[0] = float("nan")
    y = dispatch.int8_pixel_conv2d(**to_device(arguments, triton_device), out_dtype=torch.float32).cpu()
    assert y[:, :, :2, :2].isnan().all() and y[:, :, 2:].isfinite().all() and y[:, :, :, 2:].isfinite().all()


def test_a_scale_per_pixel_gains_where_pixels_differ_and_the_convolution_keeps_it(generator):
    x = functional.silu(torch.randn(2, 32, 9, 7, generator=generator) * torch.rand(2, 1, 9, 7, generator=generator) * 5)
    qweight = codes((16, 3, 3, 32), generator)
    arguments = (qweight, torch.full((16,), 0.01), border_sums(qweight))
    exact = functional.conv2d(x.double(), qweight.permute(0, 3, 1, 2).double() * 0.01, None, 1, 1)
    pixel = int8_pixel_conv2d_ref(quantize_pixel_ref(x, LOW), *arguments, out_dtype=torch.float32)
    image = int8_conv2d_ref(quantize_image_ref(x, LOW), *arguments, out_dtype=torch.float32)
    pixel_error, image_error = ((y - exact).square().sum() for y in (pixel, image))
    assert pixel_error < image_error / 2


@pytest.mark.parametrize("low", [None, LOW], ids=["symmetric", "low"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "crop"])
@pytest.mark.parametrize("shape", [(1, 64, 4, 5), (2, 20, 3, 7), (1, 130, 1, 4)], ids=str)
def test_quantize_pixel_kernel_equals_the_reference_bit_for_bit(shape, layout, low, generator, triton_device):
    B, C, H, W = shape
    x = functional.silu(torch.randn(B, C, H + 2, W + 1, generator=generator).half() * 3)
    x = x[:, :, 1 : H + 1, 1:] if layout == "crop" else x[:, :, :H, :W].contiguous()
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    x[0, 3, 0, 0] = float("nan")
    expected, actual = quantize_pixel_ref(x, low), dispatch.quantize_pixel(x.to(triton_device), low)
    assert torch.equal(actual.codes.cpu(), expected.codes) and actual.rows_per_scale == 1
    assert torch.equal(actual.scale.cpu().nan_to_num(-1.0), expected.scale.nan_to_num(-1.0))
    assert expected.scale.isnan().tolist() == [True] + [False] * (B * H * W - 1)
    assert (actual.zero_point is None) == (low is None) and (low is None or torch.equal(actual.zero_point.cpu(), expected.zero_point))


def test_quantize_pixel_is_half_a_step_away_at_most(generator):
    x = functional.silu(torch.randn(2, 20, 3, 7, generator=generator))
    for low in (None, LOW):
        found = quantize_pixel_ref(x, low)
        error = (found.dequantize().permute(0, 3, 1, 2) - x).abs().permute(0, 2, 3, 1).flatten(0, 2)
        assert (error <= (0.51 if low is None else 1.01) * found.scale[:, None]).all()


def test_int8_pixel_conv2d_refuses_scales_per_image_other_kernels_and_zero_points_without_sums(generator):
    arguments = operands((1, 4, 4, 20, 18), generator)
    a = arguments["activation"]
    image = QuantizedActivation(a.codes, a.scale[:1], None, 16)
    with pytest.raises(LayoutError, match="one per pixel are needed"):
        int8_pixel_conv2d_ref(**{**arguments, "activation": image})
    with pytest.raises(LayoutError, match=r"\(Cout, 3, 3, Cin\) is needed"):
        int8_pixel_conv2d_ref(**{**arguments, "qweight": arguments["qweight"][:, :1, :1]})
    with pytest.raises(LayoutError, match="zero points without border_sums"):
        int8_pixel_conv2d_ref(**{**arguments, "border_sums": None})
