"""int8_upsample_conv2d: four 2x2 convolutions are nearest-2x and 3x3; the kernel is the reference."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import LayoutError
from stepquant.kernels import dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.design import Design
from stepquant.kernels.int8_upsample_conv2d import int8_upsample_conv2d_ref, phase_weight, summed_taps
from stepquant.kernels.tables import forced_design

SHAPES = [(2, 5, 7, 20, 24), (1, 1, 1, 8, 16), (2, 1, 4, 33, 8)]  # B, H, W, Cin, Cout


def image(shape: tuple[int, ...], generator: torch.Generator, asymmetric: bool = True) -> QuantizedActivation:
    B, H, W, C, _ = shape
    codes = torch.randint(-128, 128, (B, H, W, C), generator=generator, dtype=torch.int8)
    zero_point = torch.randint(-128, 128, (B,), generator=generator, dtype=torch.int32) if asymmetric else None
    return QuantizedActivation(codes, torch.rand(B, generator=generator) * 0.01 + 0.001, zero_point, H * W)


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Nearest-2x and the 3x3 convolution, in float64. x: NHWC, weight: (Cout, 3, 3, Cin)."""
    large = torch.nn.functional.interpolate(x.double().permute(0, 3, 1, 2), scale_factor=2, mode="nearest")
    return torch.nn.functional.conv2d(large, weight.double().permute(0, 3, 1, 2), None if bias is None else bias.double(), 1, 1)


def by_phases(x: torch.Tensor, phases: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The four 2x2 convolutions of the small image, in float64."""
    B, H, W, _ = x.shape
    y = torch.empty(B, phases.shape[1], 2 * H, 2 * W, dtype=torch.float64)
    for phase, weight in enumerate(phases.double()):
        p, q = divmod(phase, 2)
        padded = torch.nn.functional.pad(x.double().permute(0, 3, 1, 2), (1 - q, q, 1 - p, p))
        y[:, :, p::2, q::2] = torch.nn.functional.conv2d(padded, weight.permute(0, 3, 1, 2), None if bias is None else bias.double())
    return y


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().double() - expected.double()).norm() / expected.double().norm())


def moved(a: QuantizedActivation, device: torch.device) -> QuantizedActivation:
    zero_point = None if a.zero_point is None else a.zero_point.to(device)
    return QuantizedActivation(a.codes.to(device), a.scale.to(device), zero_point, a.rows_per_scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_summed_taps_make_nearest_2x_and_3x3_exactly(shape, generator):
    B, H, W, Cin, Cout = shape
    x = torch.randn(B, H, W, Cin, generator=generator, dtype=torch.float64)
    weight = torch.randn(Cout, 3, 3, Cin, generator=generator, dtype=torch.float64)
    assert relative_error(by_phases(x, summed_taps(weight), None), plain(x, weight, None)) <= 1e-14


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_upsample_conv2d_matches_float64(shape, asymmetric, generator, triton_device):
    _, _, _, Cin, Cout = shape
    a, weight = image(shape, generator, asymmetric), phase_weight(torch.randn(Cout, 3, 3, Cin, generator=generator))
    bias = torch.randn(Cout, generator=generator)
    expected = by_phases(a.dequantize(torch.float64), weight.codes.double() * weight.scale.double()[:, :, None, None, None], bias)
    y = int8_upsample_conv2d_ref(a, weight, bias, torch.float32)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, expected) <= 5e-6
    on_device = type(weight)(weight.codes.to(triton_device), weight.scale.to(triton_device), weight.border_sums.to(triton_device))
    y = dispatch.int8_upsample_conv2d(moved(a, triton_device), on_device, bias.to(triton_device), torch.float32)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, expected) <= 5e-6


@pytest.mark.parametrize(
    "design",
    [
        Design(64, 32, 32, 4, 2, tma=True), Design(64, 32, 32, 4, 2, split_k=2), Design(64, 32, 32, 4, 2, persistent=True),
        Design(64, 16, 32, 4, 2, tma=True, rest_n=16),
    ],
    ids=str,
)  # fmt: skip
def test_int8_upsample_conv2d_is_the_reference_for_every_design(design, generator, triton_device):
    a, weight = image((1, 8, 8, 32, 40), generator), phase_weight(torch.randn(40, 3, 3, 32, generator=generator))
    addend = torch.randn(1, 40, 16, 16, generator=generator).contiguous(memory_format=torch.channels_last)
    on_device = type(weight)(weight.codes.to(triton_device), weight.scale.to(triton_device), weight.border_sums.to(triton_device))
    with forced_design(design):
        y = dispatch.int8_upsample_conv2d(moved(a, triton_device), on_device, None, torch.float32, addend=addend.to(triton_device))
    assert relative_error(y, int8_upsample_conv2d_ref(a, weight, None, torch.float32, addend=addend)) <= 1e-6


def test_int8_upsample_conv2d_on_the_dequantized_backend_is_the_same_layer(generator, monkeypatch):
    from stepquant.kernels import backend

    a, weight = image((2, 5, 7, 20, 24), generator), phase_weight(torch.randn(24, 3, 3, 20, generator=generator))
    expected = dispatch.int8_upsample_conv2d(a, weight, None, torch.float32)
    monkeypatch.setenv(backend.OVERRIDE, "dequantized")
    backend.forget_choices()
    assert relative_error(dispatch.int8_upsample_conv2d(a, weight, None, torch.float32), expected) <= 5e-6
    backend.forget_choices()


def test_phase_weight_rounds_the_sum_of_the_taps_and_counts_its_memory(generator):
    weight = torch.randn(16, 3, 3, 64, generator=generator)
    made, exact = phase_weight(weight), summed_taps(weight.double())
    assert made.nbytes == 4 * 16 * 2 * 2 * 64 + 4 * 16 * 4 + 4 * 16 * 16 * 4
    restored = made.codes.double() * made.scale.double()[:, :, None, None, None]
    assert (restored - exact).abs().div(made.scale.double()[:, :, None, None, None]).max() <= 0.5 + 1e-4
    # From the stored 3x3 codes the taps have been rounded before: a little worse, and never by much.
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    from_codes = phase_weight((weight / scale).round() * scale)
    twice = (from_codes.codes.double() * from_codes.scale.double()[:, :, None, None, None] - exact).norm()
    assert (restored - exact).norm() < twice < 2 * (restored - exact).norm()


def test_phase_weight_refuses_other_kernel_sizes():
    with pytest.raises(LayoutError, match=r"\(8, 1, 1, 4\)"):
        phase_weight(torch.zeros(8, 1, 1, 4))
