"""Counting clipped values on a real GPU: the references' counts, in CUDA graphs, without waiting for the GPU, on time."""

from __future__ import annotations

import pytest
import torch

from stepquant.kernels import dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.backend import Backend
from stepquant.kernels.channel_group import channel_groups
from stepquant.kernels.geglu_quantize import geglu_quantize_ref
from stepquant.kernels.group_norm_silu_quantize import group_norm_silu_quantize_ref
from stepquant.kernels.int8_geglu_gemm import int8_geglu_gemm_ref
from stepquant.kernels.layer_norm_quantize import layer_norm_quantize_ref
from stepquant.kernels.quantize_channel_group import quantize_channel_group_ref
from stepquant.kernels.quantize_static import quantize_static_ref
from stepquant.kernels.static_scale import StaticScale

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or dispatch.choose_backend("cuda").backend is not Backend.TRITON,
    reason="needs an NVIDIA GPU (sm_80 or newer) with Triton; `python -m stepquant check` says what is missing",
)

DEVICE = "cuda"


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed))


def static_scale(scale: float = 0.012) -> StaticScale:
    """Two samples with a zero point; values beyond 1 to 2 standard deviations are clipped."""
    bucket, zero_point = torch.tensor([3, 40], device=DEVICE), torch.full((64,), -20, dtype=torch.int32, device=DEVICE)
    return StaticScale(torch.full((64,), scale, device=DEVICE), zero_point, bucket, torch.zeros(2, dtype=torch.int32, device=DEVICE))


def quantize(call, x, static):
    return call(x, static.scale, static.zero_point, static.bucket, static.clipped)


def operations() -> dict:
    """name -> (kernel, reference): what each is called with but for the static scale, on SDXL's shapes."""
    rows, wide, image = randn(2048, 1280).half(), randn(2048, 10240).half(), randn(2, 320, 64, 64).half()
    groups = channel_groups(torch.randperm(1280).int().to(DEVICE), torch.tensor([3, 1] + [0] * 18, dtype=torch.int8), 64)
    norm, group_norm = (torch.rand(1280, device=DEVICE) + 0.5, randn(1280)), (torch.rand(320, device=DEVICE) + 0.5, randn(320))
    codes = torch.randint(-127, 128, (2048, 1280), dtype=torch.int8, device=DEVICE)
    weight = torch.randint(-127, 128, (10240, 1280), dtype=torch.int8, device=DEVICE)
    product = (
        QuantizedActivation(codes, torch.full((1,), 1e-3, device=DEVICE), None, 2048),
        weight,
        torch.full((10240,), 1e-2, device=DEVICE),
    )
    return {
        "rows": (lambda s: quantize(dispatch.quantize_static, rows, s), lambda s: quantize(quantize_static_ref, rows, s)),
        "images": (lambda s: quantize(dispatch.quantize_static, image, s), lambda s: quantize(quantize_static_ref, image, s)),
        "groups": (lambda s: dispatch.quantize_channel_group(rows, groups, s), lambda s: quantize_channel_group_ref(rows, groups, s)),
        "layer_norm": (
            lambda s: dispatch.layer_norm_quantize(rows, *norm, 1e-5, s),
            lambda s: layer_norm_quantize_ref(rows, *norm, 1e-5, s),
        ),
        "geglu": (lambda s: dispatch.geglu_quantize(wide, s), lambda s: geglu_quantize_ref(wide, s)),
        "group_norm": (
            lambda s: dispatch.group_norm_silu_quantize([image], *group_norm, 1e-5, True, (s,)),
            lambda s: group_norm_silu_quantize_ref([image], *group_norm, 1e-5, True, (s,)),
        ),
        "geglu_gemm": (lambda s: dispatch.int8_geglu_gemm(*product, static=s), lambda s: int8_geglu_gemm_ref(*product, static=s)),
    }


NAMES = ("rows", "images", "groups", "layer_norm", "geglu", "group_norm", "geglu_gemm")


@pytest.mark.parametrize("name", NAMES)
def test_kernels_count_what_the_references_count_on_sdxl_shapes(name):
    kernel, reference = operations()[name]
    counted, expected = static_scale(), static_scale()
    kernel(counted)
    reference(expected)
    found, wanted = counted.clipped.tolist(), expected.clipped.tolist()
    assert found[1] == wanted[1] and wanted[0] > 1000
    # fp32 rounding puts a few values on the other side of the last code's edge; quantizing alone divides as the reference does.
    assert abs(found[0] - wanted[0]) <= (0 if name in ("rows", "images", "groups") else 1e-3 * wanted[0])


def test_counting_runs_in_a_cuda_graph_and_never_waits_for_the_gpu():
    kernels, static = [kernel for kernel, _ in operations().values()], static_scale()
    for kernel in kernels:
        kernel(static)
    once = static.clipped.clone()
    arrived, event = torch.zeros(2, dtype=torch.int32, pin_memory=True), torch.cuda.Event()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for kernel in kernels:
            kernel(static)
        arrived.copy_(static.clipped, non_blocking=True)  # as hosts/comfy/saturation.py does after a step
        static.clipped.zero_()
        event.record()
        event.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    event.synchronize()
    assert torch.equal(arrived, 2 * once.cpu())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for kernel in kernels:
            kernel(static)
    static.clipped.zero_()
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(static.clipped, 2 * once)
