"""Counting clipped values: every operation that writes static codes, reference and kernel, against codes made in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stepquant.errors import LayoutError
from stepquant.kernels import backend, dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.channel_group import channel_groups
from stepquant.kernels.static_scale import StaticScale

SCALES = (0.006, 0.009)  # of the two samples: values of a few standard deviations are clipped


@pytest.fixture(params=["reference", "kernel"])
def device(request, monkeypatch) -> torch.device:
    """The reference on the CPU, or the kernels where they can run."""
    if request.param == "kernel":
        return request.getfixturevalue("triton_device")
    monkeypatch.setenv(backend.OVERRIDE, "reference")
    backend.forget_choices()
    return torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["symmetric", "zero_point"])
def static(request, device) -> StaticScale:
    scale = torch.ones(64)
    scale[3], scale[40] = SCALES
    zero_point = torch.full((64,), -60, dtype=torch.int32, device=device) if request.param else None
    return StaticScale(scale.to(device), zero_point, torch.tensor([3, 40], device=device), torch.zeros(2, dtype=torch.int32, device=device))


def clipped_values(y: torch.Tensor, static: StaticScale) -> int:
    """y: (2, ...) float64, one entry per sample."""
    codes = (y / torch.tensor(SCALES, dtype=torch.float64).view(2, *[1] * (y.ndim - 1))).round()
    lowest, zero_point = (-127, 0) if static.zero_point is None else (-128, -60)
    codes += zero_point
    return int(((codes < lowest) | (codes > 127)).sum())


def assert_counted(static: StaticScale, y: torch.Tensor, rows: int, tolerance: int = 0) -> None:
    found, expected = static.clipped.tolist(), clipped_values(y.double().cpu(), static)
    assert expected > 10 and abs(found[0] - expected) <= tolerance and found[1] == rows, (found, expected, rows)


def test_quantize_static_counts_rows_and_what_it_clipped(static, device, generator):
    x = torch.randn(2, 33, 40, generator=generator)
    x[0, 0, 0], x[1, 1, 1] = float("inf"), float("nan")
    rows = x.view(66, 40).to(device)
    dispatch.quantize_static(rows, static.scale, static.zero_point, static.bucket, static.clipped)
    assert_counted(static, x, 66)
    before = static.clipped.tolist()
    dispatch.quantize_static(rows, static.scale, static.zero_point, static.bucket, static.clipped)
    assert static.clipped.tolist() == [2 * count for count in before], "counters are added to"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_quantize_static_counts_pixels_of_images(layout, static, device, generator):
    x = torch.randn(2, 40, 7, 9, generator=generator).contiguous(memory_format=layout)
    dispatch.quantize_static(x.to(device), static.scale, static.zero_point, static.bucket, static.clipped)
    assert_counted(static, x, 2 * 7 * 9)


@pytest.mark.parametrize("images", [False, True], ids=["rows", "images"])
def test_quantize_channel_group_counts_in_its_groups_units(images, static, device, generator):
    x = torch.randn(2, 40, 6, 5, generator=generator)
    order, exponents = torch.randperm(40, generator=generator).int(), torch.tensor([2, 0, 0], dtype=torch.int8)
    groups = channel_groups(order.to(device), exponents, 16)
    given = x if images else x.permute(0, 2, 3, 1).reshape(60, 40)
    dispatch.quantize_channel_group(given.to(device), groups, static)
    assert_counted(static, x * groups.channel_factor.cpu().view(1, 40, 1, 1), 60)


@pytest.mark.parametrize("K", [40, 640])
def test_layer_norm_quantize_counts_what_it_clipped(K, static, device, generator):
    x, weight, bias = torch.randn(2, 11, K, generator=generator), torch.rand(K, generator=generator), torch.rand(K, generator=generator)
    dispatch.layer_norm_quantize(x.view(22, K).to(device), weight.to(device), bias.to(device), 1e-5, static)
    assert_counted(static, F.layer_norm(x.double(), (K,), weight.double(), bias.double(), 1e-5), 22, tolerance=1)


def test_geglu_quantize_counts_what_it_clipped(static, device, generator):
    x = torch.randn(2, 11, 160, generator=generator)
    dispatch.geglu_quantize(x.view(22, 160).to(device), static)
    value, gate = x.double().chunk(2, -1)
    assert_counted(static, value * F.gelu(gate), 22, tolerance=1)


@pytest.mark.parametrize("widths", [(64,), (32, 32)], ids=["one", "two"])
def test_group_norm_silu_quantize_counts_every_pixel_once(widths, static, device, generator):
    segments = [torch.randn(2, width, 6, 7, generator=generator) for width in widths]
    weight, bias = torch.rand(64, generator=generator), torch.rand(64, generator=generator)
    moved = [segment.to(device) for segment in segments]
    dispatch.group_norm_silu_quantize(moved, weight.to(device), bias.to(device), 1e-5, True, (static,))
    y = F.group_norm(torch.cat(segments, 1).double(), 32, weight.double(), bias.double(), 1e-5)
    assert_counted(static, F.silu(y), 2 * 6 * 7, tolerance=1)


def test_int8_geglu_gemm_counts_what_it_clipped(static, device, generator):
    codes = torch.randint(-127, 128, (66, 48), generator=generator, dtype=torch.int8)
    qweight = torch.randint(-127, 128, (80, 48), generator=generator, dtype=torch.int8)
    activation = QuantizedActivation(codes.to(device), torch.tensor([1e-2], device=device), None, 66)
    bias = torch.full((80,), 20.0)  # beyond the codes by itself, and so in the rows of a tile that are not there
    dispatch.int8_geglu_gemm(activation, qweight.to(device), torch.full((80,), 2e-3, device=device), None, bias.to(device), static=static)
    value, gate = (codes.double() @ qweight.double().t() * 2e-5 + bias.double()).view(2, 33, 80).chunk(2, -1)
    assert_counted(static, value * F.gelu(gate), 66, tolerance=1)


def test_nothing_is_counted_without_counters(device, generator):
    x = torch.randn(4, 40, generator=generator).to(device)
    scale, bucket = torch.full((64,), 0.01, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    counters = torch.zeros(2, dtype=torch.int32, device=device)
    plain = dispatch.quantize_static(x, scale, None, bucket)
    counted = dispatch.quantize_static(x, scale, None, bucket, counters)
    assert torch.equal(plain.codes, counted.codes) and int(counters[0]) > 0


def test_static_scale_refuses_counters_of_another_kind():
    with pytest.raises(LayoutError, match="two int32 counters are needed"):
        StaticScale(torch.ones(64), None, torch.zeros(1, dtype=torch.int64), torch.zeros(3))
