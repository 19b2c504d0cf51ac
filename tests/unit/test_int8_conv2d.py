"""int8_conv2d: padding with a zero point, strides, degenerate sides; reference against float64, kernel against reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stepquant.errors import LayoutError
from stepquant.kernels import dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.design import Design
from stepquant.kernels.int8_conv2d import border_sums, int8_conv2d_ref
from stepquant.kernels.tables import forced_design

# B, H, W, Cin, Cout
SHAPES = [(1, 8, 8, 64, 64), (2, 5, 7, 20, 24), (2, 1, 4, 33, 8), (3, 6, 1, 16, 70), (1, 1, 1, 8, 8), (1, 9, 9, 130, 16)]
SDXL = (1, 4, 4, 320, 64)  # the input channels of its first level
TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def codes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def layer(shape: tuple[int, ...], generator: torch.Generator, asymmetric: bool = True, kernel: int = 3) -> dict:
    """Arguments of int8_conv2d with random codes, and scales of each image's own."""
    B, H, W, Cin, Cout = shape
    qweight = codes((Cout, kernel, kernel, Cin), generator)
    zero_point = torch.randint(-128, 128, (B,), generator=generator, dtype=torch.int32) if asymmetric else None
    return {
        "activation": QuantizedActivation(
            codes((B, H, W, Cin), generator), torch.rand(B, generator=generator) * 0.01 + 0.001, zero_point, H * W
        ),
        "qweight": qweight,
        "weight_scale": torch.rand(Cout, generator=generator) * 0.001 + 0.0001,
        "border_sums": border_sums(qweight) if asymmetric else None,
        "bias": torch.randn(Cout, generator=generator),
        "padding": kernel // 2,
    }


def to_device(arguments: dict, device: torch.device) -> dict:
    a = arguments["activation"]
    moved = QuantizedActivation(
        a.codes.to(device), a.scale.to(device), None if a.zero_point is None else a.zero_point.to(device), a.rows_per_scale
    )
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()} | {"activation": moved}


def expected_float64(arguments: dict, stride: int) -> torch.Tensor:
    """torch's own convolution of the dequantized operands, in float64."""
    a = arguments["activation"]
    images_per_entry = a.codes.shape[0] // a.scale.numel()
    scale = a.scale.double().repeat_interleave(images_per_entry).view(-1, 1, 1, 1)
    zero_point = 0 if a.zero_point is None else a.zero_point.repeat_interleave(images_per_entry).view(-1, 1, 1, 1)
    x = ((a.codes.double() - zero_point) * scale).permute(0, 3, 1, 2)
    weight = (arguments["qweight"].double() * arguments["weight_scale"].double().view(-1, 1, 1, 1)).permute(0, 3, 1, 2)
    bias = None if arguments["bias"] is None else arguments["bias"].double()
    return torch.nn.functional.conv2d(x, weight, bias, stride, arguments["padding"])


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [*SHAPES, SDXL], ids=str)
def test_int8_conv2d_reference_matches_float64(shape, stride, asymmetric, generator):
    arguments = layer(shape, generator, asymmetric)
    y = int8_conv2d_ref(**arguments, stride=stride, out_dtype=torch.float32)
    expected = expected_float64(arguments, stride)
    assert y.shape == expected.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_int8_conv2d_reference_matches_float64_without_padding(kernel, stride, generator):
    arguments = layer((2, 7, 6, 20, 24), generator, kernel=kernel) | {"padding": 0}
    y = int8_conv2d_ref(**arguments, stride=stride, out_dtype=torch.float32)
    assert relative_error(y, expected_float64(arguments, stride)) <= TOLERANCE[torch.float32]


def test_int8_conv2d_reference_matches_float64_when_images_come_in_several_blocks(generator):
    arguments = layer((3, 50, 60, 8, 8), generator)
    y = int8_conv2d_ref(**arguments, out_dtype=torch.float16)
    assert relative_error(y, expected_float64(arguments, 1)) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize(("H", "W"), [(8, 8), (7, 5), (1, 1), (1, 6), (2, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_int8_conv2d_of_zeros_is_zero_up_to_the_border_whatever_the_zero_point(H, W, stride, generator, triton_device):
    arguments = layer((1, H, W, 24, 16), generator) | {"bias": None}
    a = arguments["activation"]
    for zero_point in (-128, -3, 127):
        zeros = torch.full_like(a.codes, zero_point)
        arguments["activation"] = QuantizedActivation(zeros, a.scale, torch.tensor([zero_point], dtype=torch.int32), H * W)
        assert int8_conv2d_ref(**arguments, stride=stride).eq(0).all()
        assert dispatch.int8_conv2d(**to_device(arguments, triton_device), stride=stride).eq(0).all()


def test_int8_conv2d_border_sums_count_the_taps_inside(generator):
    qweight = codes((5, 3, 3, 7), generator)
    sums = border_sums(qweight)
    assert sums.shape == (16, 5) and sums.dtype == torch.int32
    taps = qweight.long().sum(-1)
    assert torch.equal(sums[0].long(), taps.sum((1, 2)))
    assert torch.equal(sums[4 * 1 + 0].long(), taps[:, 1:].sum((1, 2)))  # first row outside
    assert torch.equal(sums[4 * 2 + 1].long(), taps[:, :2, 1:].sum((1, 2)))  # last row and first column outside
    assert torch.equal(sums[15].long(), taps[:, 1, 1])  # only the centre is inside
    assert torch.equal(border_sums(qweight[:, :1, :1])[9].long(), taps[:, 0, 0])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [*SHAPES, SDXL], ids=str)
def test_int8_conv2d_sums_of_reference_and_kernel_equal_the_exact_ones_bit_for_bit(shape, stride, generator, triton_device):
    arguments = layer(shape, generator, asymmetric=False)
    a = arguments["activation"]
    narrow = QuantizedActivation(a.codes.clamp(-60, 60), torch.ones_like(a.scale), None, a.rows_per_scale)
    arguments |= {"activation": narrow, "weight_scale": torch.ones(shape[4]), "bias": None}
    exact = expected_float64(arguments, stride)
    assert exact.abs().max() < 2**24
    y = dispatch.int8_conv2d(**to_device(arguments, triton_device), stride=stride, out_dtype=torch.float32)
    assert torch.equal(y.cpu().double(), exact)
    assert torch.equal(int8_conv2d_ref(**arguments, stride=stride, out_dtype=torch.float32).double(), exact)


# Tiles of 96 and 80 columns, of which the last one reaches beyond Cout, with its first block or only with its rest.
WITH_REST = [Design(64, 64, 32, 4, 2, tma=True, rest_n=32), Design(128, 64, 32, 4, 2, group_m=1, tma=True, rest_n=16)]
WITH_REST_SHAPES = [(2, 8, 15, 48, 200), (1, 8, 16, 32, 168), (3, 8, 8, 16, 8)]
with_rest = pytest.mark.parametrize("design", [*WITH_REST, replace(WITH_REST[0], persistent=True)], ids=lambda design: design.label)


@with_rest
@pytest.mark.parametrize("shape", WITH_REST_SHAPES, ids=str)
def test_int8_conv2d_sums_of_tiles_with_a_rest_equal_the_exact_ones_bit_for_bit(shape, design, generator, triton_device):
    arguments = layer(shape, generator, asymmetric=False)
    a = arguments["activation"]
    narrow = QuantizedActivation(a.codes.clamp(-60, 60), torch.ones_like(a.scale), None, a.rows_per_scale)
    arguments |= {"activation": narrow, "weight_scale": torch.ones(shape[4]), "bias": None}
    with forced_design(design):
        y = dispatch.int8_conv2d(**to_device(arguments, triton_device), out_dtype=torch.float32)
    assert torch.equal(y.cpu().double(), expected_float64(arguments, 1))


@with_rest
@pytest.mark.parametrize("addend", ["per image", "per pixel"])
def test_int8_conv2d_finishes_tiles_with_a_rest_as_the_reference_does(addend, design, generator, triton_device):
    shape = WITH_REST_SHAPES[0]
    B, H, W, _, Cout = shape
    arguments = layer(shape, generator)
    added = torch.randn((B, Cout) if addend == "per image" else (B, H, W, Cout), generator=generator)
    arguments["addend"] = added if added.ndim == 2 else added.permute(0, 3, 1, 2)
    with forced_design(design):
        y = dispatch.int8_conv2d(**to_device(arguments, triton_device), out_dtype=torch.float32)
    assert relative_error(y, int8_conv2d_ref(**arguments, out_dtype=torch.float32)) <= 1e-6


@with_rest
@pytest.mark.parametrize(("Cin", "stride"), [(32, 2), (20, 1)], ids=["stride 2", "unaligned channels"])
def test_int8_conv2d_takes_a_design_with_a_rest_where_descriptors_cannot_serve(Cin, stride, design, generator, triton_device):
    arguments = layer((1, 8, 16, Cin, 104), generator)
    with forced_design(design):
        y = dispatch.int8_conv2d(**to_device(arguments, triton_device), stride=stride, out_dtype=torch.float32)
    assert relative_error(y, int8_conv2d_ref(**arguments, stride=stride, out_dtype=torch.float32)) <= 1e-6


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_conv2d_kernel_matches_float64_with_a_zero_point_per_image(shape, stride, generator, triton_device):
    arguments = layer(shape, generator)
    y = dispatch.int8_conv2d(**to_device(arguments, triton_device), stride=stride, out_dtype=torch.float32)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, expected_float64(arguments, stride)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("out_dtype", list(TOLERANCE), ids=str)
def test_int8_conv2d_kernel_matches_the_reference_when_one_scale_serves_the_batch(out_dtype, generator, triton_device):
    arguments = layer((2, 6, 6, 64, 24), generator)
    a = arguments["activation"]
    arguments["activation"] = QuantizedActivation(a.codes, a.scale[:1], a.zero_point[:1], a.rows)
    y = dispatch.int8_conv2d(**to_device(arguments, triton_device), out_dtype=out_dtype)
    assert y.dtype == out_dtype
    assert relative_error(y, expected_float64(arguments, 1)) <= TOLERANCE[out_dtype]
    if out_dtype == torch.float32:  # the interpreter truncates to bf16 where a GPU rounds, so others differ
        assert relative_error(y, int8_conv2d_ref(**arguments, out_dtype=out_dtype)) <= 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(24, 5, 5, 20, dtype=torch.int8)}, r"\(24, 5, 5, 20\).*Keep this layer in 16 bit"),
        ({"qweight": torch.zeros(24, 3, 3, 21, dtype=torch.int8)}, "for 180 terms"),
        ({"stride": 3}, "stride 3"),
        ({"border_sums": None}, "zero point without border_sums"),
    ],
    ids=["5x5", "channels differ", "stride 3", "no border_sums"],
)
def test_int8_conv2d_refuses_operands_that_do_not_fit(change, message, generator):
    with pytest.raises(LayoutError, match=message):
        int8_conv2d_ref(**layer((2, 5, 7, 20, 24), generator) | change)


def test_int8_conv2d_refuses_scales_that_differ_within_an_image(generator):
    arguments = layer((2, 5, 7, 20, 24), generator)
    a = arguments["activation"]
    per_pixel = QuantizedActivation(a.codes, torch.ones(a.rows), torch.zeros(a.rows, dtype=torch.int32), 1)
    with pytest.raises(LayoutError, match="one scale per 1 pixels of 5x7 images"):
        int8_conv2d_ref(**arguments | {"activation": per_pixel})
