"""Gluon's convolution on a Hopper GPU, which nothing can interpret: against the references, with images and channels cut unevenly."""

from __future__ import annotations

import pytest
import torch

from stepquant.kernels import dispatch
from stepquant.kernels.activation import FP8, QuantizedActivation
from stepquant.kernels.backend import Backend
from stepquant.kernels.design import GLUON, Design
from stepquant.kernels.fp8_conv2d import fp8_conv2d_ref
from stepquant.kernels.int8_conv2d import border_sums, int8_conv2d_ref
from stepquant.kernels.tables import forced_design
from stepquant.kernels.triton_ops import launch
from stepquant.kernels.triton_ops.fp8_conv2d import fp8_conv2d
from stepquant.kernels.triton_ops.int8_conv2d import int8_conv2d

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(
    not HOPPER or dispatch.choose_backend("cuda").backend is not Backend.TRITON,
    reason="needs an NVIDIA Hopper GPU (sm_90) with Triton; `python -m stepquant check` says what is missing",
)

DESIGNS = [
    Design(128, 128, 128, 8, 3, backend=GLUON, rest_n=32),
    Design(64, 128, 128, 4, 3, backend=GLUON, rest_n=32),
    Design(128, 128, 128, 4, 4, backend=GLUON, rest_n=32),
    Design(128, 128, 128, 8, 3, group_m=4, backend=GLUON),
]
# B, H, W, Cin, Cout: boxes beyond the image, a last tile of few channels, one box per image, SDXL's own.
SHAPES = [(2, 8, 15, 48, 200), (3, 16, 30, 64, 168), (1, 24, 31, 320, 320), (1, 8, 16, 16, 8), (2, 32, 32, 1280, 1280)]
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
DEVICE = "cuda"
designs = pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.label)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture
def calls(monkeypatch):
    """Notes each convolution that Gluon's kernel carries out."""
    module = launch.gluon("conv_launch")
    noted, convolve = [], module.convolve
    monkeypatch.setattr(module, "convolve", lambda *arguments: noted.append(1) or convolve(*arguments))
    return noted


def layer(shape: tuple[int, ...], dtype: torch.dtype = torch.int8, zero_points: int = 0, addend: str = "", out_dtype=torch.float16) -> dict:
    """Arguments of either convolution. zero_points: 0 for none, 1 for all images, B for one each."""
    (B, H, W, Cin, Cout), generator = shape, torch.Generator(DEVICE).manual_seed(sum(shape))

    def codes(*size: int) -> torch.Tensor:
        if dtype is torch.int8:
            return torch.randint(-128, 128, size, dtype=dtype, device=DEVICE, generator=generator)
        return (torch.randn(size, device=DEVICE, generator=generator) * 30).to(dtype)

    samples = zero_points or B
    zero_point = torch.randint(-128, 128, (samples,), dtype=torch.int32, device=DEVICE, generator=generator) if zero_points else None
    scale = torch.rand(samples, device=DEVICE, generator=generator) * 0.01 + 0.001
    arguments = {"activation": QuantizedActivation(codes(B, H, W, Cin), scale, zero_point, B * H * W // samples)}
    arguments |= {"qweight": codes(Cout, 3, 3, Cin), "weight_scale": torch.rand(Cout, device=DEVICE, generator=generator) * 1e-3 + 1e-4}
    arguments["bias"] = torch.randn(Cout, device=DEVICE, generator=generator).half()
    if dtype is torch.int8:
        arguments["border_sums"] = border_sums(arguments["qweight"]) if zero_points else None
    if addend == "per image":
        arguments["addend"] = torch.randn(B, Cout, device=DEVICE, generator=generator).to(out_dtype)
    if addend == "residual":
        residual = torch.randn(B, H, W, Cout, device=DEVICE, generator=generator).to(out_dtype)
        arguments["addend"] = residual.permute(0, 3, 1, 2)
    return arguments


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("addend", ["", "per image", "residual"])
@pytest.mark.parametrize("zero_points", ["none", "one", "per image"])
@shapes
@designs
def test_gluon_int8_conv2d_is_the_reference(design, shape, zero_points, addend, calls):
    arguments = layer(shape, zero_points={"none": 0, "one": 1, "per image": shape[0]}[zero_points], addend=addend)
    with forced_design(design):
        y, again = int8_conv2d(**arguments), int8_conv2d(**arguments)
    assert len(calls) == 2 and torch.equal(y, again)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, int8_conv2d_ref(**arguments, out_dtype=torch.float32)) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("addend", ["per image", "residual"])
@designs
def test_gluon_int8_conv2d_stores_bfloat16(design, addend, calls):
    arguments = layer(SHAPES[0], zero_points=1, addend=addend, out_dtype=torch.bfloat16)
    with forced_design(design):
        y = int8_conv2d(**arguments, out_dtype=torch.bfloat16)
    assert calls and relative_error(y, int8_conv2d_ref(**arguments, out_dtype=torch.float32)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("addend", ["", "per image", "residual"])
@shapes
@designs
def test_gluon_fp8_conv2d_is_the_reference(design, shape, addend, calls):
    arguments = layer(shape, FP8, addend=addend)
    with forced_design(design):
        y = fp8_conv2d(**arguments)
    # Hopper sums fp8 products with about 14 bits of mantissa.
    assert calls and relative_error(y, fp8_conv2d_ref(**arguments, out_dtype=torch.float32)) <= 5e-3
