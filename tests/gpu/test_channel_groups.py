"""Channel groups on a real GPU: SDXL's shapes, exact sums, codes, CUDA graphs, no host sync. Their cost: benchmarks/channel_groups.py."""

from __future__ import annotations

import pytest
import torch

from stepquant.kernels import dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.backend import Backend
from stepquant.kernels.channel_group import ChannelGroups, channel_groups
from stepquant.kernels.channel_group_conv2d import channel_group_conv2d_ref, grouped_border_sums
from stepquant.kernels.channel_group_gemm import channel_group_gemm_ref
from stepquant.kernels.quantize_channel_group import quantize_channel_group_ref
from stepquant.kernels.static_scale import StaticScale

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or dispatch.choose_backend("cuda").backend is not Backend.TRITON,
    reason="needs an NVIDIA GPU (sm_80 or newer) with Triton; `python -m stepquant check` says what is missing",
)

DEVICE = "cuda"
LINEARS = [(2048, 10240, 1280), (2048, 1280, 1280), (2048, 1280, 5120), (8192, 640, 640), (154, 640, 2048)]  # M, N, K
CONVS = [(32, 1280, 1280, 1), (128, 320, 320, 1), (64, 640, 640, 2)]  # side, Cin, Cout, stride
# Exponents of the first blocks; all others 0.
EXPONENTS = [[], [3], [4, 2, 1, 1]]


def codes(*shape: int, seed: int = 0, largest: int = 128) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randint(-largest, largest, shape, generator=generator, dtype=torch.int8, device=DEVICE)


def groups_of(K: int, first: list[int], granularity: int = 64) -> ChannelGroups:
    order = torch.randperm(K, generator=torch.Generator().manual_seed(3)).int()
    exponents = torch.tensor(first + [0] * (-(-K // granularity) - len(first)), dtype=torch.int8)
    return channel_groups(order.to(DEVICE), exponents, granularity)


@pytest.mark.parametrize("first", EXPONENTS, ids=str)
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_channel_group_gemm_sums_equal_the_reference_bit_for_bit_on_sdxl_shapes(shape, first):
    M, N, K = shape
    activation = QuantizedActivation(codes(M, K, largest=16), torch.ones(1, device=DEVICE), None, M)
    arguments = (activation, groups_of(K, first), codes(N, K, seed=1, largest=16), torch.ones(N, device=DEVICE))
    y, expected = (call(*arguments, out_dtype=torch.float32) for call in (dispatch.channel_group_gemm, channel_group_gemm_ref))
    assert expected.abs().max() < 2**24  # fp32 holds the sums
    assert torch.equal(y, expected)


@pytest.mark.parametrize("granularity", [32, 64, 128])
def test_channel_group_gemm_serves_every_granularity_of_the_kernels(granularity):
    activation = QuantizedActivation(codes(2048, 1280, largest=16), torch.ones(1, device=DEVICE), None, 2048)
    arguments = (activation, groups_of(1280, [3, 1], granularity), codes(1280, 1280, seed=1, largest=16), torch.ones(1280, device=DEVICE))
    y, expected = (call(*arguments, out_dtype=torch.float32) for call in (dispatch.channel_group_gemm, channel_group_gemm_ref))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("first", EXPONENTS, ids=str)
@pytest.mark.parametrize("shape", CONVS, ids=str)
def test_channel_group_conv2d_equals_the_reference_on_sdxl_shapes(shape, first, asymmetric):
    side, Cin, Cout, stride = shape
    groups, qweight = groups_of(Cin, first), codes(Cout, 3, 3, Cin, seed=1, largest=16)
    zero_point = torch.tensor([-100, 50], dtype=torch.int32, device=DEVICE) if asymmetric else None
    activation = QuantizedActivation(codes(2, side, side, Cin, largest=16), torch.ones(2, device=DEVICE), zero_point, side * side)
    arguments = (activation, groups, qweight, torch.ones(Cout, device=DEVICE), grouped_border_sums(qweight, groups), None, stride)
    y, expected = (call(*arguments, out_dtype=torch.float32) for call in (dispatch.channel_group_conv2d, channel_group_conv2d_ref))
    assert float((y - expected).norm() / expected.norm()) <= 1e-6


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("shape", [(2048, 1280), (2, 320, 128, 128), (2, 640, 64, 64)], ids=str)
def test_quantize_channel_group_codes_equal_the_reference_on_sdxl_shapes(shape, static):
    x = torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(2)).half()
    groups = groups_of(shape[1], [4, 2])
    entry = None
    if static:
        scale, zero_point = torch.full((64,), 0.02, device=DEVICE), torch.full((64,), -20, dtype=torch.int32, device=DEVICE)
        entry = StaticScale(scale, zero_point, torch.tensor([3, 40], device=DEVICE))
    layouts = (torch.contiguous_format, torch.channels_last) if x.ndim == 4 else (torch.contiguous_format,)
    for layout in layouts:
        x = x.contiguous(memory_format=layout)
        actual, expected = dispatch.quantize_channel_group(x, groups, entry), quantize_channel_group_ref(x, groups, entry)
        assert torch.equal(actual.scale, expected.scale)
        assert torch.equal(actual.codes, expected.codes)


def test_channel_groups_run_in_a_cuda_graph_and_never_wait_for_the_gpu():
    x, images = torch.randn(2048, 640, device=DEVICE).half(), torch.randn(2, 320, 32, 32, device=DEVICE).half()
    linear, conv, ones = codes(640, 640), codes(320, 3, 3, 320), torch.ones(640, device=DEVICE)
    wide, narrow = groups_of(640, [3]), groups_of(320, [2])
    static = StaticScale(torch.linspace(0.01, 0.1, 64, device=DEVICE), None, torch.tensor([0, 63], device=DEVICE))

    def step() -> tuple[torch.Tensor, ...]:
        return (
            dispatch.channel_group_gemm(dispatch.quantize_channel_group(x, wide), wide, linear, ones),
            dispatch.channel_group_gemm(dispatch.quantize_channel_group(x, wide, static), wide, linear, ones),
            dispatch.channel_group_conv2d(dispatch.quantize_channel_group(images, narrow), narrow, conv, ones[:320]),
            dispatch.channel_group_conv2d(dispatch.quantize_channel_group(images, narrow, static), narrow, conv, ones[:320]),
        )

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
