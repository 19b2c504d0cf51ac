"""Channel groups in the kernels: quantize, GEMM and conv against float64 and on dequantized operands, kernel against reference."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import LayoutError
from stepquant.kernels import channel_group, dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.channel_group import ChannelGroups, channel_groups
from stepquant.kernels.channel_group_conv2d import channel_group_conv2d_ref, grouped_border_sums
from stepquant.kernels.channel_group_gemm import channel_group_gemm_ref
from stepquant.kernels.design import Design
from stepquant.kernels.quantize_channel_group import quantize_channel_group_ref
from stepquant.kernels.static_scale import StaticScale
from stepquant.kernels.tables import forced_design

TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# K, granularity, exponents per block: one group, two, and many with a ragged end.
GROUPINGS = [
    (64, 64, [0]), (333, 64, [5, 2, 2, 0, 0, 0]), (130, 32, [3, 2, 1, 1, 0]), (256, 128, [4, 0]),
]  # fmt: skip
FINE = (333, 8, [6] + [4] * 3 + [1] * 10 + [0] * 28)
# On tensor descriptors and from pointers; the first is what the interpreter would choose.
DESIGNS = [None, Design(64, 64, 128, 4, 3, tma=True), Design(64, 128, 64, 4, 2)]


def groups_of(grouping: tuple[int, int, list[int]], generator: torch.Generator, device: torch.device | str = "cpu") -> ChannelGroups:
    K, granularity, exponents = grouping
    order = torch.randperm(K, generator=generator).int()
    return channel_groups(order.to(device), torch.tensor(exponents, dtype=torch.int8), granularity)


def outliers(shape: tuple[int, ...], groups: ChannelGroups, generator: torch.Generator) -> torch.Tensor:
    """Random numbers whose channels (dimension 1) are as large as their groups say."""
    x = torch.randn(shape, generator=generator)
    return x / groups.channel_factor.cpu().view(1, -1, *[1] * (len(shape) - 2))


def static_tables(generator: torch.Generator, asymmetric: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    scale = torch.rand(64, generator=generator) * 0.02 + 0.01
    return scale, torch.randint(-128, 128, (64,), generator=generator, dtype=torch.int32) if asymmetric else None


def codes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def on(device: torch.device, value):
    """The value's tensors on the device."""
    if isinstance(value, QuantizedActivation):
        return QuantizedActivation(value.codes.to(device), value.scale.to(device), on(device, value.zero_point), value.rows_per_scale)
    if isinstance(value, ChannelGroups):
        exponents = -value.position_factor.cpu().log2()[:: value.granularity]
        return channel_groups(value.order.to(device), exponents, value.granularity)
    if isinstance(value, StaticScale):
        return StaticScale(on(device, value.scale), on(device, value.zero_point), on(device, value.bucket))
    return value.to(device) if isinstance(value, torch.Tensor) else value


def values(activation: QuantizedActivation, groups: ChannelGroups) -> torch.Tensor:
    """What the codes stand for in the input's channel order, float64; channels last."""
    zero_point = 0 if activation.zero_point is None else activation.per_row(activation.zero_point)[:, None]
    rows = activation.codes.double().view(activation.rows, -1) - zero_point
    rows = rows * activation.per_row(activation.scale).double()[:, None] / groups.position_factor.double()
    x = torch.empty_like(rows)
    x[:, groups.order.long()] = rows
    return x.view(activation.codes.shape)


def in_model_order(qweight: torch.Tensor, groups: ChannelGroups) -> torch.Tensor:
    weight = torch.empty_like(qweight)
    weight[..., groups.order.long()] = qweight
    return weight.double()


def linear(M: int, N: int, groups: ChannelGroups, generator: torch.Generator, asymmetric: bool, entries: int = 1) -> dict:
    qweight = codes((N, groups.channels), generator)
    zero_point = torch.randint(-128, 128, (entries,), generator=generator, dtype=torch.int32) if asymmetric else None
    scale = torch.rand(entries, generator=generator) * 0.01 + 0.001
    return {
        "activation": QuantizedActivation(codes((M, groups.channels), generator), scale, zero_point, M // entries),
        "groups": groups,
        "qweight": qweight,
        "weight_scale": torch.rand(N, generator=generator) * 0.001 + 0.0001,
        "weight_sum": dispatch.shifted_codes(qweight, groups).sum(1, dtype=torch.int32),
        "bias": torch.randn(N, generator=generator),
    }


def linear_float64(arguments: dict) -> torch.Tensor:
    groups = arguments["groups"]
    weight = in_model_order(arguments["qweight"], groups) * arguments["weight_scale"].double()[:, None]
    return values(arguments["activation"], groups) @ weight.t() + arguments["bias"].double()


def conv(shape: tuple[int, int, int], N: int, groups: ChannelGroups, generator: torch.Generator, asymmetric: bool) -> dict:
    B, H, W = shape
    qweight = codes((N, 3, 3, groups.channels), generator)
    zero_point = torch.randint(-128, 128, (B,), generator=generator, dtype=torch.int32) if asymmetric else None
    scale = torch.rand(B, generator=generator) * 0.01 + 0.001
    return {
        "activation": QuantizedActivation(codes((B, H, W, groups.channels), generator), scale, zero_point, H * W),
        "groups": groups,
        "qweight": qweight,
        "weight_scale": torch.rand(N, generator=generator) * 0.001 + 0.0001,
        "border_sums": grouped_border_sums(qweight, groups),
        "bias": torch.randn(N, generator=generator),
    }


def conv_float64(arguments: dict, stride: int, padding: int) -> torch.Tensor:
    groups = arguments["groups"]
    weight = in_model_order(arguments["qweight"], groups) * arguments["weight_scale"].double().view(-1, 1, 1, 1)
    x = values(arguments["activation"], groups).permute(0, 3, 1, 2)
    return torch.nn.functional.conv2d(x, weight.permute(0, 3, 1, 2), arguments["bias"].double(), stride, padding)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().double() - expected.double()).norm() / expected.double().norm())


def test_channel_groups_tables_describe_the_borders_on_a_worked_example():
    order = torch.arange(20, dtype=torch.int32).flip(0)
    groups = channel_groups(order, torch.tensor([3, 1, 1, 0, 0]), 4)
    assert groups.borders == ((0, 4, 2), (4, 12, 1), (12, 20, 0))
    assert groups.ends.tolist() == [4, 12, -1] and groups.shifts.tolist() == [2, 1, 0]
    assert groups.position_factor.tolist() == [1 / 8] * 4 + [1 / 2] * 8 + [1.0] * 8
    assert torch.equal(groups.channel_factor, groups.position_factor.flip(0))


def test_quantize_channel_group_follows_the_formula_on_a_worked_example():
    groups = channel_groups(torch.tensor([2, 0, 1], dtype=torch.int32), torch.tensor([4, 0, 0]), 1)
    x = torch.tensor([[1.0, -0.5, 32.0]])  # divided: 2, 1, -0.5 in stored order
    result = quantize_channel_group_ref(x, groups)
    assert result.scale.item() == pytest.approx(2 / 127)
    assert result.codes.tolist() == [[127, 64, -32]]


@pytest.mark.parametrize("grouping", [*GROUPINGS, FINE], ids=str)
def test_quantize_channel_group_holds_every_channel_to_half_a_step_of_its_group(grouping, generator):
    groups = groups_of(grouping, generator)
    x = outliers((77, groups.channels), groups, generator)
    result = quantize_channel_group_ref(x, groups)
    step = result.scale.double()[:, None] / groups.channel_factor.double()
    assert bool(((values(result, groups) - x.double()).abs() <= step * 0.5001).all())


@pytest.mark.parametrize("asymmetric", [None, False, True], ids=["dynamic", "static", "static with zero point"])
@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (78,), (3, 5, 7), (2, 1, 9)], ids=["one row", "rows", "images", "one pixel high"])
def test_quantize_channel_group_kernel_equals_the_reference(shape, grouping, asymmetric, generator, triton_device):
    groups = groups_of(grouping, generator)
    x = outliers((shape[0], groups.channels, *shape[1:]), groups, generator).half()
    buckets = torch.tensor([5]) if shape[0] % 3 else torch.tensor([63, 0, 17])
    static = None if asymmetric is None else StaticScale(*static_tables(generator, asymmetric), buckets)
    for layout in (torch.contiguous_format, torch.channels_last) if x.ndim == 4 else (torch.contiguous_format,):
        x = x.contiguous(memory_format=layout)
        expected = quantize_channel_group_ref(x, groups, static)
        actual = dispatch.quantize_channel_group(x.to(triton_device), on(triton_device, groups), on(triton_device, static))
        assert torch.equal(actual.codes.cpu(), expected.codes)
        assert torch.equal(actual.scale.cpu(), expected.scale)
        assert actual.rows_per_scale == expected.rows_per_scale
        assert (actual.zero_point is None) == (expected.zero_point is None)


def test_quantize_channel_group_rounds_an_images_ties_as_the_reference(triton_device):
    """Halves of a step: multiplied by 1 / scale instead of divided, a tenth of them is rounded to the other neighbour."""
    groups = channel_groups(torch.arange(256, dtype=torch.int32), torch.tensor([3, 0]), 128)
    scales = torch.linspace(0.01, 0.02, 40)
    x = torch.arange(-127, 129).sub(0.5).mul(scales[:, None]).clamp(-127 * scales[:, None], 127 * scales[:, None])
    x = (x / groups.channel_factor)[:, :, None, None].contiguous(memory_format=torch.channels_last)
    actual = dispatch.quantize_channel_group(x.to(triton_device), on(triton_device, groups))
    expected = quantize_channel_group_ref(x, groups)
    assert torch.equal(actual.scale.cpu(), expected.scale)
    assert torch.equal(actual.codes.cpu(), expected.codes)


def test_quantize_channel_group_makes_only_the_row_nan_that_was_not_finite(generator, triton_device):
    groups = groups_of(GROUPINGS[1], generator)
    x = outliers((9, groups.channels), groups, generator)
    x[4, 100] = float("inf")
    for result in (quantize_channel_group_ref(x, groups), dispatch.quantize_channel_group(x.to(triton_device), on(triton_device, groups))):
        assert result.scale.isnan().nonzero().flatten().tolist() == [4]
        assert not bool(result.codes[4].any())


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("entries", [1, 3, 78], ids=["one scale", "per sample", "per token"])
@pytest.mark.parametrize("grouping", [*GROUPINGS, FINE], ids=str)
def test_channel_group_gemm_reference_matches_float64(grouping, entries, asymmetric, generator):
    arguments = linear(78, 130, groups_of(grouping, generator), generator, asymmetric, entries)
    for out_dtype, tolerance in TOLERANCE.items():
        y = channel_group_gemm_ref(**arguments, out_dtype=out_dtype)
        assert y.dtype == out_dtype
        assert relative_error(y, linear_float64(arguments)) <= tolerance


def test_channel_group_gemm_sums_are_exact_when_they_come_close_to_int32s_limit():
    # 128 channels at 2^9, the others at 1: sums of the largest codes reach 128 * 512 * 127 * 127 + 64 * 127 * 127 = 1.06e9.
    groups = channel_groups(torch.arange(192, dtype=torch.int32), torch.tensor([9, 9, 0]), 64)
    arguments = {
        "activation": QuantizedActivation(torch.full((2, 192), 127, dtype=torch.int8), torch.ones(1), None, 2),
        "qweight": torch.full((3, 192), -127, dtype=torch.int8),
        "weight_scale": torch.ones(3),
    }
    y = channel_group_gemm_ref(groups=groups, **arguments, out_dtype=torch.float64)
    assert y.eq(-(128 * 512 + 64) * 127.0**2).all()


@pytest.mark.parametrize("design", DESIGNS, ids=["default", "descriptors", "pointers"])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
def test_channel_group_gemm_kernel_matches_the_reference(grouping, asymmetric, design, generator, triton_device):
    arguments = linear(78, 130, groups_of(grouping, generator), generator, asymmetric, 3)
    moved = {key: on(triton_device, value) for key, value in arguments.items()}
    for out_dtype, tolerance in TOLERANCE.items():
        if design is None:
            y = dispatch.channel_group_gemm(**moved, out_dtype=out_dtype)
        else:
            with forced_design(design):
                y = dispatch.channel_group_gemm(**moved, out_dtype=out_dtype)
        assert y.dtype == out_dtype
        assert relative_error(y, linear_float64(arguments)) <= tolerance
        if out_dtype == torch.float32:
            assert relative_error(y, channel_group_gemm_ref(**arguments, out_dtype=out_dtype)) <= 1e-6


def test_channel_group_gemm_kernel_sums_equal_the_exact_ones_bit_for_bit(generator, triton_device):
    groups = groups_of(GROUPINGS[1], generator)
    arguments = linear(19, 40, groups, generator, False)
    narrow = QuantizedActivation(arguments["activation"].codes.clamp(-20, 20), torch.ones(1), None, 19)
    arguments |= {"activation": narrow, "weight_scale": torch.ones(40), "bias": None}
    exact = narrow.codes.long() @ dispatch.shifted_codes(arguments["qweight"], groups).long().t()
    assert exact.abs().max() < 2**24  # fp32 holds the sums
    y = dispatch.channel_group_gemm(**{key: on(triton_device, value) for key, value in arguments.items()}, out_dtype=torch.float32)
    assert torch.equal(y.cpu().long(), exact)


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (1, 0)])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("grouping", [*GROUPINGS, FINE], ids=str)
def test_channel_group_conv2d_reference_matches_float64(grouping, asymmetric, stride, padding, generator):
    arguments = conv((2, 7, 5), 70, groups_of(grouping, generator), generator, asymmetric)
    expected = conv_float64(arguments, stride, padding)
    for out_dtype, tolerance in TOLERANCE.items():
        y = channel_group_conv2d_ref(**arguments, stride=stride, padding=padding, out_dtype=out_dtype)
        assert y.shape == expected.shape and y.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(y, expected) <= tolerance


@pytest.mark.parametrize("design", DESIGNS, ids=["default", "descriptors", "pointers"])
@pytest.mark.parametrize(("stride", "padding", "asymmetric"), [(1, 1, True), (2, 1, False)])
@pytest.mark.parametrize("grouping", GROUPINGS[1:], ids=str)
def test_channel_group_conv2d_kernel_matches_the_reference(grouping, asymmetric, stride, padding, design, generator, triton_device):
    arguments = conv((2, 8, 8), 40, groups_of(grouping, generator), generator, asymmetric)
    moved = {key: on(triton_device, value) for key, value in arguments.items()} | {"stride": stride, "padding": padding}
    with forced_design(design or Design(64, 64, 64, 8, 3)):
        y = dispatch.channel_group_conv2d(**moved, out_dtype=torch.float32)
    assert relative_error(y, conv_float64(arguments, stride, padding)) <= 5e-6


def test_channel_groups_finer_than_a_kernels_step_give_the_references_result(generator, triton_device):
    arguments = linear(78, 130, groups_of(FINE, generator), generator, True)
    moved = {key: on(triton_device, value) for key, value in arguments.items()}
    y = dispatch.channel_group_gemm(**moved, out_dtype=torch.float32)
    assert relative_error(y, linear_float64(arguments)) <= 5e-6


def test_channel_groups_say_once_that_the_reference_runs(generator, triton_device, caplog):
    channel_group._say_reference_runs.cache_clear()
    for granularity in (8, 8, 32):
        groups = groups_of((64, granularity, [0] * (64 // granularity)), generator, triton_device)
        codes, ones = torch.ones(4, 64, dtype=torch.int8, device=triton_device), torch.ones(4, device=triton_device)
        dispatch.channel_group_gemm(QuantizedActivation(codes, ones, None, 1), groups, codes, ones)
    (record,) = caplog.records
    assert "channel groups of 8 channels run in plain torch" in record.getMessage()


@pytest.mark.parametrize(("exponents", "K"), [([0, 0, 0], 40), ([5, 2, 2, 0], 63), ([3, 1, 0, 0], 64)], ids=str)
def test_channel_groups_give_their_exponents_back(exponents, K):
    groups = channel_groups(torch.arange(K).int(), torch.tensor(exponents, dtype=torch.int8), 16)
    assert groups.exponents.tolist() == exponents and groups.exponents.dtype == torch.int8


def test_channel_groups_give_the_references_result_up_to_rounding_when_dequantized(generator, monkeypatch):
    from stepquant.kernels import backend

    product = linear(20, 30, groups_of(GROUPINGS[2], generator), generator, True)
    image = conv((2, 5, 4), 30, groups_of(GROUPINGS[2], generator), generator, True)
    monkeypatch.setenv(backend.OVERRIDE, "dequantized")
    backend.forget_choices()
    y = dispatch.channel_group_gemm(**product, out_dtype=torch.float32)
    picture = dispatch.channel_group_conv2d(**image, stride=2, out_dtype=torch.float32)
    backend.forget_choices()
    assert relative_error(y, linear_float64(product)) <= 1e-5
    assert relative_error(picture, conv_float64(image, 2, 1)) <= 1e-5


def test_channel_groups_refuse_an_input_of_another_width(generator):
    groups = groups_of(GROUPINGS[0], generator)
    with pytest.raises(LayoutError, match="groups of 64 channels for an input of 65"):
        quantize_channel_group_ref(torch.zeros(3, 65), groups)
    arguments = linear(4, 8, groups_of(GROUPINGS[1], generator), generator, False)
    with pytest.raises(LayoutError, match="groups of 64 channels for an input of 333"):
        channel_group_gemm_ref(**arguments | {"groups": groups})
