"""quantize_wide, the GroupNorm that writes its planes, and products with them: against float64, and the kernels against the references."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from stepquant.errors import LayoutError
from stepquant.hosts import compute
from stepquant.kernels import dispatch
from stepquant.kernels.activation import WIDE, QuantizedActivation, WideActivation
from stepquant.kernels.dispatch import DynamicScale
from stepquant.kernels.group_norm_silu_quantize import group_norm_silu_quantize_ref
from stepquant.kernels.quantize_wide import quantize_wide_ref
from stepquant.quant.scheme import TOKEN16
from stepquant.quant.sqnr import sqnr_db
from stepquant.quant.weight import quantize_weight

# The interpreter computes lanes that no pixel needs, and NumPy warns of what they hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

SHAPES = [(5, 64), (3, 1), (4, 1500), (2, 20, 5, 7), (1, 64, 8, 8), (3, 130, 1, 4), (2, 33, 9, 1)]


def values(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """fp16; rows, or images, of different magnitude."""
    size = torch.arange(1, shape[0] + 1).view(-1, *[1] * (len(shape) - 1))
    return (torch.randn(shape, generator=generator) * size).half()


def assert_same(actual: WideActivation, expected: WideActivation) -> None:
    for one, other in ((actual.high, expected.high), (actual.low, expected.low)):
        assert torch.equal(one.codes.cpu(), other.codes) and one.codes.is_contiguous()
        assert torch.equal(one.scale.cpu().nan_to_num(-1.0), other.scale.nan_to_num(-1.0))
        assert one.zero_point is None and one.rows_per_scale == other.rows_per_scale


def as_integers(activation: WideActivation) -> torch.Tensor:
    return 256 * activation.high.codes.int() + activation.low.codes.int()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_wide_reference_matches_float64(shape, generator):
    x = values(shape, generator)
    result = quantize_wide_ref(x)
    scale = x.double().abs().amax(tuple(range(1, x.ndim)), keepdim=True) / 32512
    expected = (x.double() / scale).round()
    expected = expected.permute(0, 2, 3, 1) if x.ndim == 4 else expected
    assert (as_integers(result) - expected).abs().max() <= 1
    assert (as_integers(result) != expected).double().mean() <= 0.01
    torch.testing.assert_close(result.high.scale, 256 * result.low.scale, rtol=0, atol=0)
    torch.testing.assert_close(result.low.scale.double(), scale.flatten(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "crop"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_wide_kernel_equals_the_reference_bit_for_bit(shape, layout, generator, triton_device):
    x = values(shape, generator)
    if layout == "channels_last" and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "crop":
        x = values((*shape[:-2], shape[-2] + 1, shape[-1] + 2), generator)[..., 1:, 2:]
    assert_same(dispatch.quantize_wide(x.to(triton_device)), quantize_wide_ref(x))


def test_quantize_wide_holds_every_value_of_its_range(triton_device):
    """Each 16-bit code once: the planes' carry, both ends and all ties between planes among them."""
    x = torch.arange(-32512, 32513, dtype=torch.float32)[None]
    found = dispatch.quantize_wide(x.to(triton_device))
    assert torch.equal(as_integers(found).cpu(), x.int())
    assert_same(found, quantize_wide_ref(x))


def test_quantize_wide_marks_rows_that_are_not_finite_and_no_other(generator, triton_device):
    x = values((4, 70), generator)
    x[1, 3], x[2, 69] = float("nan"), float("-inf")
    found = dispatch.quantize_wide(x.to(triton_device))
    assert_same(found, quantize_wide_ref(x))
    assert found.low.scale.isnan().tolist() == [False, True, True, False]
    assert found.high.codes[1:3].abs().max() == 0 and found.low.codes[1:3].abs().max() == 0


def test_quantize_wide_gives_zeros_for_zeros(triton_device):
    found = dispatch.quantize_wide(torch.zeros(2, 16, 3, 3, device=triton_device))
    assert float(found.dequantize().abs().max()) == 0


def test_quantize_wide_of_other_shapes_is_refused():
    with pytest.raises(LayoutError, match="Flatten rows first"):
        quantize_wide_ref(torch.zeros(2, 3, 4))


@pytest.mark.parametrize("widths", [(64,), (32, 64)], ids=str)
def test_group_norm_silu_quantize_writes_wide_planes_of_the_activated_image(widths, generator, triton_device):
    segments = [values((2, width, 5, 7), generator) for width in widths]
    weight, bias = 1 + 0.3 * torch.randn(2, sum(widths), generator=generator)
    options = {"dynamic": DynamicScale.IMAGE, "dtype": WIDE}
    moved = [segment.to(triton_device) for segment in segments]
    (found,) = dispatch.group_norm_silu_quantize(moved, weight.to(triton_device), bias.to(triton_device), **options)
    (expected,) = group_norm_silu_quantize_ref(segments, weight, bias, **options)
    apart = (as_integers(found).cpu() - as_integers(expected)).abs()
    assert apart.max() <= 2  # the statistics' rounding is 1/256 of an 8-bit code's step and more
    z = functional.silu(functional.group_norm(torch.cat(segments, 1).double(), 32, weight.double(), bias.double(), 1e-5))
    assert sqnr_db(z.permute(0, 2, 3, 1), found.dequantize().double().cpu()) > 80


@pytest.mark.parametrize("options", [{"dynamic": DynamicScale.TOKEN, "silu": False}, {"joined": False}], ids=str)
def test_group_norm_silu_quantize_refuses_wide_codes_that_it_cannot_write(options, generator):
    x = values((1, 32, 4, 4), generator)
    with pytest.raises(LayoutError, match="16-bit codes"):
        group_norm_silu_quantize_ref([x], torch.ones(32), torch.zeros(32), dtype=WIDE, **options)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: dispatch.geglu_quantize(x, None, WIDE),
        lambda x: dispatch.layer_norm_quantize(x, torch.ones(64), torch.zeros(64), dtype=WIDE),
        lambda x: dispatch.quantize_joined(x.view(4, 16, 2, 2), x.view(4, 16, 2, 2), None, WIDE),
    ],
    ids=["geglu", "layer norm", "joined"],
)
def test_producers_of_8_bit_codes_refuse_wide_ones(operation, generator):
    with pytest.raises(LayoutError, match="quantize_wide"):
        operation(values((4, 64), generator))


def layer(weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device | str = "cpu") -> compute.LayerTensors:
    codes = quantize_weight(weight, "layer")
    tensors = (codes.codes.to(device), codes.scale.to(device), None if bias is None else bias.to(device))
    return compute.LayerTensors("layer", TOKEN16, *tensors)


def dequantized(tensors: compute.LayerTensors) -> torch.Tensor:
    weight = tensors.qweight.double().cpu() * tensors.weight_scale.double().cpu().view(-1, *[1] * (tensors.qweight.ndim - 1))
    return weight.permute(0, 3, 1, 2) if weight.ndim == 4 else weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_linear_with_wide_codes_is_as_exact_as_its_dtype(dtype, generator, triton_device):
    x, bias = values((6, 96), generator).to(dtype), torch.randn(48, generator=generator).to(dtype)
    tensors = layer(torch.randn(48, 96, generator=generator), bias, triton_device)
    y = compute.linear(x.to(triton_device), tensors, torch.zeros(1, dtype=torch.int64, device=triton_device))
    exact = functional.linear(x.double(), dequantized(tensors), bias.double())
    assert y.dtype is dtype
    # The interpreter rounds to bf16 towards zero.
    assert sqnr_db(exact, y.double().cpu()) > min(sqnr_db(exact, exact.to(dtype).double()) - 7, 75)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(2, 32, 5, 7), (1, 48, 1, 4), (4, 32, 8, 8)], ids=str)
def test_convolution_with_wide_codes_is_as_exact_as_fp16(shape, stride, generator, triton_device):
    x, bias = values(shape, generator), torch.randn(40, generator=generator).half()
    tensors = layer(torch.randn(40, shape[1], 3, 3, generator=generator), bias, triton_device)
    y = compute.conv2d(x.to(triton_device), tensors, torch.zeros(1, dtype=torch.int64, device=triton_device), stride, 1)
    exact = functional.conv2d(x.double(), dequantized(tensors), bias.double(), stride, 1)
    assert y.dtype is torch.float16 and y.shape == exact.shape
    assert sqnr_db(exact, y.double().cpu()) > 65


def test_wide_codes_add_what_a_fused_layer_adds(generator, triton_device):
    x, addend = values((2, 32, 5, 7), generator), torch.randn(2, 40, generator=generator).half()
    tensors = layer(torch.randn(40, 32, 3, 3, generator=generator), None, triton_device)
    codes = dispatch.quantize_wide(x.to(triton_device))
    y = compute.code_convolution(codes, tensors, torch.float16, 1, 1, addend.to(triton_device))
    exact = functional.conv2d(x.double(), dequantized(tensors), None, 1, 1) + addend.double()[:, :, None, None]
    assert sqnr_db(exact, y.double().cpu()) > 65


def test_split_planes_are_the_codes_they_were_split_from():
    codes = torch.tensor([[-32512, -129, -128, -1, 0, 127, 128, 32512]], dtype=torch.int32)
    planes = WideActivation.split(codes, torch.tensor([0.5]), 1)
    assert isinstance(planes.high, QuantizedActivation)
    assert torch.equal(planes.dequantize(), 0.5 * codes)
