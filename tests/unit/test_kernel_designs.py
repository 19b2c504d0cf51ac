"""Every way the product kernels can be cut (descriptors, split-K, persistent, halves) gives the same numbers."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import FormatError
from stepquant.kernels import dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.design import Design
from stepquant.kernels.int8_conv2d import border_sums, int8_conv2d_ref
from stepquant.kernels.int8_gemm import int8_gemm_ref
from stepquant.kernels.tables import forced_design

DESIGNS = {
    "pointers": Design(64, 64, 32, 4, 2),
    "group of one row": Design(64, 64, 32, 4, 2, group_m=1),
    "descriptors": Design(64, 64, 32, 4, 2, tma=True),
    "split in 2": Design(64, 64, 32, 4, 2, split_k=2),
    "split in 3, descriptors": Design(64, 64, 32, 4, 2, split_k=3, tma=True),
    "split beyond K": Design(64, 64, 32, 4, 2, split_k=8),
    "persistent": Design(64, 64, 32, 4, 2, persistent=True),
    "persistent, descriptors": Design(64, 64, 32, 4, 2, persistent=True, tma=True),
    "halves": Design(64, 128, 32, 1, 2),
    "halves, split, descriptors": Design(64, 128, 32, 1, 2, split_k=2, tma=True),
    "box of 8 x 16": Design(128, 64, 32, 4, 2, tma=True),
}
designs = pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS.keys())


def codes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-90, 91, shape, generator=generator, dtype=torch.int8)


def activation(shape: tuple[int, ...], generator: torch.Generator, asymmetric: bool = True) -> QuantizedActivation:
    """Random codes with a scale for each of shape[0] samples, or two for a matrix."""
    samples = shape[0] if len(shape) == 4 else 2
    zero_point = torch.randint(-128, 128, (samples,), generator=generator, dtype=torch.int32) if asymmetric else None
    rows = torch.Size(shape[:-1]).numel()
    return QuantizedActivation(codes(shape, generator), torch.rand(samples, generator=generator) + 0.5, zero_point, rows // samples)


def moved(value, device):
    """A tensor, an activation or anything else, on the device."""
    if isinstance(value, QuantizedActivation):
        zero_point = None if value.zero_point is None else value.zero_point.to(device)
        return QuantizedActivation(value.codes.to(device), value.scale.to(device), zero_point, value.rows_per_scale)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def gemm_arguments(M: int, N: int, K: tuple[int, ...], generator: torch.Generator) -> dict:
    qweight = codes((N, sum(K)), generator)
    parts = [part.sum(1, dtype=torch.int32) for part in qweight.split(K, 1)]
    return {
        "activation": activation((M, K[0]), generator),
        "second": activation((M, K[1]), generator) if len(K) > 1 else None,
        "qweight": qweight,
        "weight_scale": torch.rand(N, generator=generator) * 1e-3 + 1e-4,
        "weight_sum": parts[0] if len(K) == 1 else torch.stack(parts),
        "bias": torch.randn(N, generator=generator),
        "addend": torch.randn(M, N, generator=generator),
        "out_dtype": torch.float32,
    }


def conv_arguments(shape: tuple[int, int, int], Cout: int, C: tuple[int, ...], generator: torch.Generator) -> dict:
    qweight = codes((Cout, 3, 3, sum(C)), generator)
    tables = [border_sums(part) for part in qweight.split(C, 3)]
    return {
        "activation": activation((*shape, C[0]), generator),
        "second": activation((*shape, C[1]), generator) if len(C) > 1 else None,
        "qweight": qweight,
        "weight_scale": torch.rand(Cout, generator=generator) * 1e-3 + 1e-4,
        "border_sums": tables[0] if len(C) == 1 else torch.stack(tables),
        "bias": torch.randn(Cout, generator=generator),
        "addend": torch.randn(shape[0], Cout, generator=generator),
        "out_dtype": torch.float32,
    }


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().double() - expected.double()).norm() / expected.double().norm())


@designs
@pytest.mark.parametrize("K", [(96,), (64, 32)], ids=["one segment", "two segments"])
def test_int8_gemm_is_the_reference_for_every_design(K, design, generator, triton_device):
    arguments = gemm_arguments(70, 72, K, generator)
    with forced_design(design):
        y = dispatch.int8_gemm(**{name: moved(value, triton_device) for name, value in arguments.items()})
    assert relative_error(y, int8_gemm_ref(**arguments)) <= 1e-6


@designs
def test_int8_conv2d_is_the_reference_for_every_design(design, generator, triton_device):
    # Boxes of 8 x 8 and 8 x 16 reach beyond the 15 columns.
    arguments = conv_arguments((1, 8, 15), 72, (32,), generator)
    with forced_design(design):
        y = dispatch.int8_conv2d(**{name: moved(value, triton_device) for name, value in arguments.items()})
    assert relative_error(y, int8_conv2d_ref(**arguments)) <= 1e-6


@pytest.mark.parametrize("name", ["descriptors", "halves, split, descriptors"])
def test_int8_conv2d_of_two_segments_is_the_reference(name, generator, triton_device):
    arguments = conv_arguments((2, 8, 8), 40, (32, 16), generator)
    with forced_design(DESIGNS[name]):
        y = dispatch.int8_conv2d(**{key: moved(value, triton_device) for key, value in arguments.items()})
    assert relative_error(y, int8_conv2d_ref(**arguments)) <= 1e-6


@pytest.mark.parametrize("name", ["descriptors", "split in 2", "persistent", "halves"])
def test_int8_conv2d_takes_strides_and_ragged_channels_with_every_kind_of_design(name, generator, triton_device):
    # Descriptors serve neither: the launcher takes pointers instead.
    arguments = conv_arguments((1, 9, 16), 24, (20,), generator) | {"addend": None, "stride": 2}
    with forced_design(DESIGNS[name]):
        y = dispatch.int8_conv2d(**{key: moved(value, triton_device) for key, value in arguments.items()})
    assert relative_error(y, int8_conv2d_ref(**arguments)) <= 1e-6


@pytest.mark.parametrize("name", ["split in 3, descriptors", "halves, split, descriptors"])
def test_int8_gemm_split_sums_are_the_same_bit_for_bit_in_every_launch(name, generator, triton_device):
    arguments = {key: moved(value, triton_device) for key, value in gemm_arguments(70, 136, (96,), generator).items()}
    with forced_design(DESIGNS[name]):
        first, second = dispatch.int8_gemm(**arguments), dispatch.int8_gemm(**arguments)
    assert torch.equal(first, second)  # the second launch finds the counters as the first left them
    with forced_design(DESIGNS["pointers"]):
        assert torch.equal(first, dispatch.int8_gemm(**arguments))


@pytest.mark.parametrize(
    "change", [{"BLOCK_M": 96}, {"num_stages": 0}, {"backend": "cublas"}, {"persistent": True, "split_k": 2}, {"BLOCK_K": "64"}], ids=str
)
def test_design_refuses_what_no_kernel_can_do(change):
    with pytest.raises(FormatError, match="Correct the table"):
        Design(**{"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2} | change)
