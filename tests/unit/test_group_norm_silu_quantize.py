"""group_norm_silu_quantize: the absmax from each channel's ends, the reference against float64, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from stepquant.errors import LayoutError
from stepquant.kernels import dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.dispatch import DynamicScale
from stepquant.kernels.group_norm_silu_quantize import SILU_DIP, SILU_DIP_DEPTH, activated_absmax, group_norm_silu_quantize_ref
from stepquant.kernels.quantize_image import quantize_image_ref
from stepquant.kernels.static_scale import StaticScale

# The interpreter computes lanes that no pixel needs, and NumPy warns of what they hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def operands(
    shape: tuple[int, ...], widths: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float16
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Segments (B, width, H, W) whose channels differ in mean and magnitude, weight and bias of a trained norm's size."""
    B, H, W = shape
    C = sum(widths)
    x = torch.randn(B, C, H, W, generator=generator) * torch.randn(C, 1, 1, generator=generator).exp()
    x += 2 * torch.randn(C, 1, 1, generator=generator)
    weight, bias = torch.randn(2, C, generator=generator)
    return [part.contiguous() for part in x.to(dtype).split(widths, 1)], (1 + 0.3 * weight).to(dtype), (0.4 * bias).to(dtype)


def static(bucket: list[int], asymmetric: bool = True, device: torch.device | str = "cpu") -> StaticScale:
    zero_point = torch.linspace(-120, -60, 64).int().to(device) if asymmetric else None
    return StaticScale(torch.linspace(0.01, 0.05, 64, device=device), zero_point, torch.tensor(bucket, device=device))


def run_both(
    segments: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor, device: torch.device, **options
) -> list[tuple[QuantizedActivation, QuantizedActivation]]:
    """(kernel's, reference's) outputs; a static scale is given as the arguments of static()."""
    scales = options.pop("scales", ())
    expected = group_norm_silu_quantize_ref(segments, weight, bias, static=[static(*scale) for scale in scales], **options)
    moved = [segment.to(device) for segment in segments]
    on_device = [static(*scale, device=device) for scale in scales]
    actual = dispatch.group_norm_silu_quantize(moved, weight.to(device), bias.to(device), static=on_device, **options)
    return list(zip(actual, expected, strict=True))


def assert_close(actual: QuantizedActivation, expected: QuantizedActivation) -> None:
    """Codes at most 1 apart on at most 0.1 %, scales to the rounding of fp32 sums, zero points equal."""
    apart = (actual.codes.cpu().int() - expected.codes.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() <= 1e-3
    torch.testing.assert_close(actual.scale.cpu(), expected.scale, rtol=5e-6, atol=0, equal_nan=True)
    assert (actual.zero_point is None) == (expected.zero_point is None)
    assert actual.zero_point is None or torch.equal(actual.zero_point.cpu(), expected.zero_point)
    assert actual.rows_per_scale == expected.rows_per_scale
    assert actual.codes.is_contiguous()


def exact_result(segments: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor, silu: bool = True) -> torch.Tensor:
    y = functional.group_norm(torch.cat(segments, 1).double(), 32, weight.double(), bias.double(), 1e-5)
    return functional.silu(y) if silu else y


def test_activated_absmax_is_the_maximum_of_silu_over_the_interval(generator):
    ends = (4 * torch.randn(100, 2, generator=generator).double()).sort(1).values
    lowest, highest = ends[:, 0], ends[:, 1]
    inside = lowest + torch.linspace(0, 1, 2001).double()[:, None] * (highest - lowest)
    torch.testing.assert_close(activated_absmax(lowest, highest, silu=True), functional.silu(inside).abs().amax(0), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(activated_absmax(lowest, highest, silu=False), inside.abs().amax(0))
    dip = torch.tensor(SILU_DIP).double().requires_grad_()
    functional.silu(dip).backward()
    assert abs(dip.grad) < 1e-7  # fp32's rounding of the dip
    assert functional.silu(dip).item() == pytest.approx(-SILU_DIP_DEPTH)


def test_activated_absmax_of_few_values_is_never_too_small_and_exact_when_one_reaches_0_465(generator):
    values = 1.5 * torch.randn(500, 4, generator=generator).double() - 0.5
    true = functional.silu(values).abs().amax(1)
    bound = activated_absmax(values.amin(1), values.amax(1), silu=True)
    assert (bound >= true).all() and (bound <= true.clamp_min(SILU_DIP_DEPTH)).all()
    reaching = values.amax(1) >= 0.465
    assert reaching.sum() > 100 and torch.equal(bound[reaching], true[reaching])
    assert (bound > true).sum() > 10  # the bound that is no maximum occurs in this test


def test_group_norm_silu_quantize_follows_the_formula_on_a_worked_example():
    # 64 channels, 2 a group, holding -1 and 1: mean 0, variance 1. silu(1) = 0.7310586, silu(-1) = -0.2689414
    x = torch.tensor([-1.0, 1.0]).repeat(32).view(1, 64, 1, 1).expand(1, 64, 2, 3)
    (activation,) = group_norm_silu_quantize_ref([x], torch.ones(64), torch.zeros(64), eps=0.0)
    assert activation.codes.shape == (1, 2, 3, 64) and activation.rows_per_scale == 6
    assert activation.scale.tolist() == pytest.approx([0.7310586 / 127])
    assert activation.codes[0, 1, 2, :4].tolist() == [-47, 127, -47, 127]


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
def test_group_norm_silu_quantize_reference_matches_float64(silu, generator):
    segments, weight, bias = operands((2, 5, 7), (64, 32), generator)
    exact = exact_result(segments, weight, bias, silu)
    (activation,) = group_norm_silu_quantize_ref(segments, weight, bias, silu=silu)
    torch.testing.assert_close(activation.scale.double(), exact.abs().amax((1, 2, 3)) / 127, rtol=1e-5, atol=0)
    # 0.51: half a step, and the rounding of fp32.
    apart = (activation.dequantize(torch.float64).permute(0, 3, 1, 2) - exact).abs()
    assert (apart <= 0.51 * activation.scale.double().view(-1, 1, 1, 1)).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"silu": False},
        {"dynamic": DynamicScale.TOKEN, "silu": False},
        {"dynamic": DynamicScale.TOKEN},
        {"dynamic": DynamicScale.SILU_IMAGE},
        {"scales": [([3, 60], False)]},
    ],
    ids=["image", "plain image", "plain token", "token", "image with zero point", "static per sample"],
)
def test_group_norm_silu_quantize_kernels_equal_the_reference(options, generator, triton_device):
    B = 2 if "scales" in options else 1  # images take the interpreter long
    segments, weight, bias = operands((B, 5, 3), (96,), generator)
    before = segments[0].clone()
    ((actual, expected),) = run_both(segments, weight, bias, triton_device, **options)
    assert_close(actual, expected)
    assert torch.equal(segments[0], before)


@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 1, 9)], ids=str)
def test_group_norm_silu_quantize_above_silus_dip_matches_float64(shape, generator):
    segments, weight, bias = operands(shape, (64, 32), generator)
    exact = exact_result(segments, weight, bias)
    (activation,) = group_norm_silu_quantize_ref(segments, weight, bias, dynamic=DynamicScale.SILU_IMAGE)
    scale = (exact.amax((1, 2, 3)) + SILU_DIP_DEPTH) / 255
    torch.testing.assert_close(activation.scale.double(), scale, rtol=1e-5, atol=0)
    assert torch.equal(activation.zero_point.double(), (SILU_DIP_DEPTH / scale).round() - 128)
    apart = (activation.dequantize(torch.float64).permute(0, 3, 1, 2) - exact).abs()
    assert (apart <= 1.01 * scale.view(-1, 1, 1, 1)).all() and float((apart > 0.51 * scale.view(-1, 1, 1, 1)).double().mean()) < 0.02


def test_group_norm_silu_quantize_above_silus_dip_gives_each_segment_its_zero_point(generator, triton_device):
    segments, weight, bias = operands((1, 4, 5), (40, 24), generator)
    weight[40:] *= 3
    outputs = run_both(segments, weight, bias, triton_device, joined=False, dynamic=DynamicScale.SILU_IMAGE)
    for actual, expected in outputs:
        assert_close(actual, expected)
    assert outputs[0][1].zero_point != outputs[1][1].zero_point


def test_group_norm_silu_quantize_above_silus_dip_is_what_quantize_image_makes_of_the_activated_image(generator):
    (x,), weight, bias = operands((2, 5, 7), (64,), generator, torch.float32)
    (fused,) = group_norm_silu_quantize_ref([x], weight, bias, dynamic=DynamicScale.SILU_IMAGE)
    one_by_one = quantize_image_ref(functional.silu(functional.group_norm(x, 32, weight, bias, 1e-5)), -SILU_DIP_DEPTH)
    assert torch.equal(fused.codes, one_by_one.codes) and torch.equal(fused.zero_point, one_by_one.zero_point)


def test_group_norm_silu_quantize_of_an_image_below_zero_has_its_zero_at_the_top(generator, triton_device):
    (x,), weight, _ = operands((1, 3, 4), (64,), generator)
    ((actual, expected),) = run_both([x], weight * 0.01, torch.full((64,), -5.0).half(), triton_device, dynamic=DynamicScale.SILU_IMAGE)
    assert expected.zero_point.tolist() == [127] and expected.scale.tolist() == pytest.approx([SILU_DIP_DEPTH / 255])
    assert_close(actual, expected)


def test_group_norm_silu_quantize_refuses_silus_dip_without_silu(generator):
    segments, weight, bias = operands((1, 4, 5), (64,), generator)
    with pytest.raises(LayoutError, match="without SiLU"):
        group_norm_silu_quantize_ref(segments, weight, bias, silu=False, dynamic=DynamicScale.SILU_IMAGE)


@pytest.mark.parametrize("layout", ["channels_last", "crop", "bf16"])
def test_group_norm_silu_quantize_kernels_take_every_layout(layout, generator, triton_device):
    (x,), weight, bias = operands((1, 9, 11), (64,), generator, torch.bfloat16 if layout == "bf16" else torch.float16)
    x = x[:, :, 1:, 2:] if layout == "crop" else x.contiguous(memory_format=torch.channels_last)
    ((actual, expected),) = run_both([x], weight, bias, triton_device)
    assert_close(actual, expected)


@pytest.mark.parametrize("scales", [[], [([7],), ([60], False)]], ids=["dynamic", "static"])
def test_group_norm_silu_quantize_writes_each_segment_with_its_own_scale(scales, generator, triton_device):
    segments, weight, bias = operands((1, 4, 5), (40, 24), generator)  # group 20 holds channels 38 to 41 of both
    outputs = run_both(segments, weight, bias, triton_device, joined=False, scales=scales)
    assert [actual.codes.shape[3] for actual, _ in outputs] == [40, 24]
    for actual, expected in outputs:
        assert_close(actual, expected)


def test_group_norm_silu_quantize_never_makes_the_concatenation_but_gives_its_result(generator, triton_device):
    segments, weight, bias = operands((1, 4, 5), (40, 56), generator)
    ((actual, expected),) = run_both(segments, weight, bias, triton_device)
    assert_close(actual, expected)
    (joined,) = group_norm_silu_quantize_ref([torch.cat(segments, 1)], weight, bias)
    assert torch.equal(expected.codes, joined.codes) and torch.equal(expected.scale, joined.scale)


def test_group_norm_silu_quantize_kernels_add_slices_of_a_large_image(generator, triton_device):
    (x,), weight, bias = operands((1, 41, 31), (32,), generator)  # 40 slices of 32 pixels, the last one partly outside
    x[:, :, 20:] += 300  # slices of different means, far larger than the deviations
    ((actual, expected),) = run_both([x], weight, bias, triton_device, scales=[([7],)])
    assert_close(actual, expected)


@pytest.mark.parametrize("is_static", [False, True], ids=["image", "static"])
def test_group_norm_silu_quantize_kernels_take_several_slices_per_program_where_there_are_many(is_static, generator, triton_device):
    (x,), weight, bias = operands((1, 130, 127), (32,), generator)  # 16,510 pixels: 33 slices of 512, the last of 126
    x[:, :, 60:] += 300
    ((actual, expected),) = run_both([x], weight, bias, triton_device, scales=[([7],)] if is_static else [])
    assert_close(actual, expected)


def test_group_norm_silu_quantize_marks_an_image_that_is_not_finite_and_no_other(generator, triton_device):
    (x,), weight, bias = operands((2, 3, 3), (32,), generator, torch.float32)
    x[0, 5, 1, 1] = float("nan")
    ((actual, expected),) = run_both([x], weight, bias, triton_device)
    assert expected.scale.isnan().tolist() == [True, False]
    assert expected.codes[0].eq(0).all()
    assert_close(actual, expected)
    x[1, 31, 2, 2] = float("inf")
    ((actual, expected),) = run_both([x[1:]], weight, bias, triton_device)
    assert expected.scale.isnan().all() and expected.codes.eq(0).all()
    assert_close(actual, expected)


def test_group_norm_silu_quantize_refuses_what_does_not_fit():
    x, vector = torch.zeros(2, 32, 4, 4), torch.ones(32)
    both = torch.ones(64)
    with pytest.raises(LayoutError, match="33 channels; a multiple of 32"):
        group_norm_silu_quantize_ref([torch.zeros(1, 33, 2, 2)], torch.ones(33), torch.ones(33))
    with pytest.raises(LayoutError, match="same batch, height and width"):
        group_norm_silu_quantize_ref([x, x[:, :, :2]], both, both)
    with pytest.raises(LayoutError, match=r"weight of shape \(64,\); \(32,\)"):
        group_norm_silu_quantize_ref([x], both, vector)
    with pytest.raises(LayoutError, match="1 static scales for 2 outputs"):
        group_norm_silu_quantize_ref([x, x], both, both, static=[static([1])], joined=False)
    with pytest.raises(LayoutError, match="a scale per pixel over 2 segments"):
        group_norm_silu_quantize_ref([x, x], both, both, dynamic=DynamicScale.TOKEN)
    with pytest.raises(LayoutError, match="3 buckets for 2 images"):
        group_norm_silu_quantize_ref([x], vector, vector, static=[static([1, 2, 3])])
