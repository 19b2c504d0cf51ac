"""The producers of int8 codes on a real GPU: SDXL's shapes, exact absmax, no host sync, CUDA graphs.

tests/unit runs its kernel tests on the GPU too where there is one; here is what the interpreter cannot show.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from stepquant.kernels import dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.attention import attention_ref
from stepquant.kernels.backend import Backend
from stepquant.kernels.channel_group import channel_groups
from stepquant.kernels.dispatch import StaticScale
from stepquant.kernels.geglu_quantize import geglu_quantize_ref
from stepquant.kernels.group_norm_silu_quantize import group_norm_silu_quantize_ref
from stepquant.kernels.layer_norm_quantize import layer_norm_quantize_ref
from stepquant.kernels.quantize_channel_group import quantize_channel_group_ref
from stepquant.kernels.quantize_joined import quantize_joined_ref
from stepquant.kernels.quantize_static import quantize_static_ref
from stepquant.kernels.quantize_token import quantize_token_ref
from stepquant.kernels.quantize_wide import quantize_wide_ref

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or dispatch.choose_backend("cuda").backend is not Backend.TRITON,
    reason="needs an NVIDIA GPU (sm_80 or newer) with Triton; `python -m stepquant check` says what is missing",
)

DEVICE = "cuda"
# Side and channels of the segments: every distinct GroupNorm before a convolution at 1024x1024
GROUP_NORMS = [(128, 320), (64, 320), (64, 640), (32, 640), (32, 1280), (32, 1280, 1280), (32, 1280, 640), (64, 1280, 640), (128, 640, 320)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed)).half()


def static(bucket: torch.Tensor, asymmetric: bool = True) -> StaticScale:
    zero_point = torch.full((64,), -20, dtype=torch.int32, device=DEVICE) if asymmetric else None
    return StaticScale(torch.linspace(0.02, 0.05, 64, device=DEVICE), zero_point, bucket)


def assert_close(actual: QuantizedActivation, expected: QuantizedActivation, scale_tolerance: float = 5e-6) -> None:
    """Codes at most 1 apart on at most 0.1 %, scales to the rounding of fp32 sums."""
    apart = (actual.codes.int() - expected.codes.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() <= 1e-3
    torch.testing.assert_close(actual.scale, expected.scale, rtol=scale_tolerance, atol=0)


@pytest.mark.parametrize("is_static", [False, True], ids=["token", "static"])
@pytest.mark.parametrize("shape", [(2048, 1280), (8192, 640)], ids=str)
def test_layer_norm_quantize_equals_the_reference_on_sdxl_shapes(shape, is_static):
    x, (weight, bias) = 3 * normal(*shape) + 1, normal(2, shape[1], seed=1)
    scale = static(torch.tensor([3, 60], device=DEVICE)) if is_static else None
    actual, y = dispatch.layer_norm_quantize(x, weight, bias, 1e-5, scale, keep_float=True)
    expected, expected_y = layer_norm_quantize_ref(x, weight, bias, 1e-5, scale, keep_float=True)
    assert_close(actual, expected)
    assert (y.double() - expected_y.double()).norm() <= 5e-4 * expected_y.double().norm()


@pytest.mark.parametrize("is_static", [False, True], ids=["token", "static"])
@pytest.mark.parametrize("shape", [(2048, 10240), (8192, 5120)], ids=str)
def test_geglu_quantize_equals_the_reference_on_sdxl_shapes(shape, is_static):
    x, scale = normal(*shape), static(torch.tensor([3, 60], device=DEVICE)) if is_static else None
    assert_close(dispatch.geglu_quantize(x, scale), geglu_quantize_ref(x, scale), 3e-5)


@pytest.mark.parametrize("keys", [77, 154, 1024])
@pytest.mark.parametrize(("tokens", "heads"), [(1024, 20), (4096, 10)])
def test_attention_equals_the_reference_on_sdxl_shapes(tokens, heads, keys):
    q, (k, v) = normal(2, tokens, 64 * heads), normal(2, 2, keys, 64 * heads, seed=1)
    exact = attention_ref(q.float(), k.float(), v.float(), heads)
    assert (dispatch.attention(q, k, v, heads) - exact).norm() <= 1e-3 * exact.norm()
    stored = static(torch.tensor([3, 60], device=DEVICE))
    actual, expected = (run(q, k, v, heads, stored) for run in (dispatch.attention, attention_ref))
    apart = (actual.codes.int() - expected.codes.int()).abs()
    assert apart.max() <= 1 and (apart > 0).double().mean() <= 0.01  # weights of 16 bit in the product
    assert torch.equal(actual.scale, expected.scale) and torch.equal(actual.zero_point, expected.zero_point)


@pytest.mark.parametrize("is_static", [False, True], ids=["image", "static"])
@pytest.mark.parametrize("shape", GROUP_NORMS, ids=str)
def test_group_norm_silu_quantize_equals_the_reference_on_sdxl_shapes(shape, is_static):
    side, *widths = shape
    segments = [(2 * normal(2, C, side, side, seed=C) - 1).contiguous(memory_format=torch.channels_last) for C in widths]
    weight, bias = normal(2, sum(widths), seed=1)
    scales = [static(torch.tensor([3, 60], device=DEVICE))] if is_static else []
    (actual,) = dispatch.group_norm_silu_quantize(segments, weight, bias, static=scales)
    (expected,) = group_norm_silu_quantize_ref(segments, weight, bias, static=scales)
    assert_close(actual, expected)
    if not is_static:  # the scale came from the channels' ends, and yet some value has the largest code
        assert (actual.codes.flatten(1).int().abs().amax(1) == 127).all()


@pytest.mark.parametrize("shape", [(2048, 1280), (2048, 5120), (8192, 640), (8192, 2560), (77, 333)], ids=str)
def test_quantize_token_equals_the_reference_bit_for_bit_on_sdxl_shapes(shape):
    """The kernel divides by a product and a correction, which the interpreter cannot show."""
    x = normal(*shape) * normal(shape[0], 1, seed=1).exp()
    actual, expected = dispatch.quantize_token(x), quantize_token_ref(x)
    assert torch.equal(actual.codes, expected.codes) and torch.equal(actual.scale, expected.scale)


@pytest.mark.parametrize("shape", [(2048, 5120), (8192, 2560), (77, 333), (2, 320, 128, 128), (2, 2560, 32, 32)], ids=str)
def test_quantize_wide_equals_the_reference_bit_for_bit_on_sdxl_shapes(shape):
    x = normal(*shape) * normal(shape[0], *[1] * (len(shape) - 1), seed=1).exp()
    x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    actual, expected = dispatch.quantize_wide(x), quantize_wide_ref(x)
    for one, other in ((actual.high, expected.high), (actual.low, expected.low)):
        assert torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("shape", [(2048, 1280), (8192, 640), (78, 333)], ids=str)
def test_quantize_static_equals_the_reference_on_sdxl_shapes(shape, asymmetric):
    scale, x = static(torch.tensor([3, 60], device=DEVICE), asymmetric), normal(*shape)
    x[5, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 6e4])
    counts = [torch.zeros(2, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    actual = dispatch.quantize_static(x, scale.scale, scale.zero_point, scale.bucket, counts[0])
    expected = quantize_static_ref(x, scale.scale, scale.zero_point, scale.bucket, counts[1])
    assert_close(actual, expected)
    assert torch.equal(actual.codes[5, :4], expected.codes[5, :4])
    assert counts[0].tolist() == counts[1].tolist()


@pytest.mark.parametrize("is_static", [False, True], ids=["token", "static"])
@pytest.mark.parametrize(("side", "first", "second"), [(128, 640, 320), (64, 1280, 640), (32, 1280, 1280), (5, 40, 24)])
def test_quantize_joined_equals_the_reference_on_sdxl_shapes(side, first, second, is_static):
    images = [normal(2, C, side, side, seed=C).contiguous(memory_format=torch.channels_last) for C in (first, second)]
    scale = static(torch.tensor([3, 60], device=DEVICE)) if is_static else None
    actual, expected = dispatch.quantize_joined(*images, scale), quantize_joined_ref(*images, scale)
    assert_close(actual, expected, 0.0)
    assert is_static or torch.equal(actual.codes, expected.codes)


@pytest.mark.parametrize("shape", [(2048, 1280), (2048, 5120), (77, 640)], ids=str)
def test_quantize_channel_group_equals_the_reference_on_sdxl_shapes(shape):
    M, K = shape
    order = torch.randperm(K, generator=torch.Generator().manual_seed(1)).int()
    groups = channel_groups(order, torch.arange(K // 128).clamp(max=3).flip(0), 128).to(torch.device(DEVICE, 0))
    x = normal(M, K)
    actual, expected = dispatch.quantize_channel_group(x, groups), quantize_channel_group_ref(x, groups)
    assert torch.equal(actual.codes, expected.codes) and torch.equal(actual.scale, expected.scale)


def step_of(bucket: torch.Tensor) -> Callable[[], list[QuantizedActivation]]:
    """Every producer once, static and dynamic, on fixed tensors."""
    x, images, skip = normal(2048, 640), normal(2, 640, 32, 32, seed=1), normal(2, 320, 32, 32, seed=2)
    images, skip = (image.contiguous(memory_format=torch.channels_last) for image in (images, skip))
    weight, bias = normal(2, 960, seed=3)
    scale = static(bucket)

    def step() -> list[QuantizedActivation]:
        (normed,) = dispatch.group_norm_silu_quantize([images, skip], weight, bias, dtype=dispatch.WIDE)
        wide = dispatch.quantize_wide(x)
        return [
            *(plane for planes in (normed, wide) for plane in (planes.high, planes.low)),
            dispatch.layer_norm_quantize(x, weight[:640], bias[:640])[0],
            dispatch.layer_norm_quantize(x, weight[:640], bias[:640], static=scale)[0],
            dispatch.geglu_quantize(x),
            dispatch.geglu_quantize(x, scale),
            *dispatch.group_norm_silu_quantize([images, skip], weight, bias),
            *dispatch.group_norm_silu_quantize([images, skip], weight, bias, static=[scale, scale], joined=False),
            dispatch.quantize_joined(images, skip),
            dispatch.quantize_joined(images, skip, scale),
            *dispatch.group_norm_silu_quantize([images], weight[:640], bias[:640], silu=False, dynamic=dispatch.DynamicScale.TOKEN),
        ]

    return step


def test_producers_never_wait_for_the_gpu():
    step = step_of(torch.tensor([1, 2], device=DEVICE))
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_producers_follow_the_bucket_and_give_the_same_bits_when_a_cuda_graph_is_replayed():
    bucket = torch.tensor([0, 63], device=DEVICE)
    step = step_of(bucket)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for values in ([5, 40], [63, 0]):
        bucket.copy_(torch.tensor(values))
        graph.replay()
        for actual, expected in zip(captured, step(), strict=True):
            assert torch.equal(actual.codes, expected.codes) and torch.equal(actual.scale, expected.scale)
