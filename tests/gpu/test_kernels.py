"""The kernels on a real GPU: SDXL's shapes, no host sync, CUDA graphs, tensors beyond 2^31 elements.

tests/unit runs its kernel tests on the GPU too where there is one; here is what the interpreter cannot show.
"""

from __future__ import annotations

import pytest
import torch

from stepquant.kernels import backend, dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.backend import Backend
from stepquant.kernels.design import Design
from stepquant.kernels.int8_conv2d import int8_conv2d_ref
from stepquant.kernels.int8_geglu_gemm import int8_geglu_gemm_ref
from stepquant.kernels.int8_gemm import int8_gemm_ref
from stepquant.kernels.int8_upsample_conv2d import int8_upsample_conv2d_ref
from stepquant.kernels.static_scale import StaticScale
from stepquant.kernels.tables import forced_design

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or dispatch.choose_backend("cuda").backend is not Backend.TRITON,
    reason="needs an NVIDIA GPU (sm_80 or newer) with Triton; `python -m stepquant check` says what is missing",
)

# M, N, K: every distinct Linear of an SDXL step at 1024x1024, CFG batch 2
LINEARS = [
    (2048, 10240, 1280), (2048, 1280, 1280), (2048, 1280, 5120), (8192, 5120, 640), (8192, 640, 640), (8192, 640, 2560),
    (154, 1280, 2048), (154, 640, 2048), (2, 1280, 2816),
]  # fmt: skip
# H = W of the input, Cin, Cout, stride
CONVS = [
    (32, 1280, 1280, 1), (128, 320, 320, 1), (64, 640, 640, 1), (32, 2560, 1280, 1), (64, 1920, 640, 1), (128, 960, 320, 1),
    (128, 320, 320, 2), (64, 640, 640, 2),
]  # fmt: skip
DEVICE = "cuda"


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8, device=DEVICE)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def unit_scales(activation_codes: torch.Tensor, rows_per_scale: int) -> QuantizedActivation:
    """An activation whose result is the bare integer sum."""
    rows = activation_codes.numel() // activation_codes.shape[-1]
    return QuantizedActivation(activation_codes, torch.ones(rows // rows_per_scale, device=DEVICE), None, rows_per_scale)


@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_int8_gemm_sums_equal_the_reference_bit_for_bit_on_sdxl_shapes(shape):
    M, N, K = shape
    activation, qweight, ones = unit_scales(codes(M, K), M), codes(N, K, seed=1), torch.ones(N, device=DEVICE)
    y = dispatch.int8_gemm(activation, qweight, ones, out_dtype=torch.float32)
    expected = int8_gemm_ref(activation, qweight, ones, out_dtype=torch.float32)
    assert expected.abs().max() < 2**24  # fp32 holds the sums
    assert torch.equal(y, expected)


@pytest.mark.parametrize("shape", CONVS, ids=str)
def test_int8_conv2d_sums_equal_the_reference_bit_for_bit_on_sdxl_shapes(shape):
    side, Cin, Cout, stride = shape
    activation, qweight = unit_scales(codes(2, side, side, Cin), side * side), codes(Cout, 3, 3, Cin, seed=1)
    ones = torch.ones(Cout, device=DEVICE)
    y = dispatch.int8_conv2d(activation, qweight, ones, stride=stride, out_dtype=torch.float32)
    expected = int8_conv2d_ref(activation, qweight, ones, stride=stride, out_dtype=torch.float32)
    assert expected.abs().max() < 2**24
    assert torch.equal(y, expected)


@pytest.mark.parametrize(("out_dtype", "tolerance"), [(torch.float16, 5e-4), (torch.bfloat16, 4e-3), (torch.float32, 5e-6)], ids=str)
def test_int8_layers_match_float64_with_zero_points_of_mixed_buckets(out_dtype, tolerance):
    x = torch.nn.functional.silu(torch.randn(2, 320, 64, 64, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(5))).half()
    scale, zero_point = torch.full((64,), 0.02, device=DEVICE), torch.full((64,), -114, dtype=torch.int32, device=DEVICE)
    scale[40], zero_point[40] = 0.03, -90
    activation = dispatch.quantize_static(x, scale, zero_point, torch.tensor([3, 40], device=DEVICE))
    exact = activation.dequantize(torch.float64)
    qweight, weight_scale = codes(640, 3, 3, 320, seed=1), torch.rand(640, device=DEVICE) * 1e-3
    bias = torch.randn(640, device=DEVICE).to(out_dtype)
    y = dispatch.int8_conv2d(activation, qweight, weight_scale, dispatch.border_sums(qweight), bias, 2, 1, out_dtype)
    weight = (qweight.double() * weight_scale.double().view(-1, 1, 1, 1)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(exact.permute(0, 3, 1, 2), weight, bias.double(), 2, 1)
    assert relative_error(y, expected) <= tolerance
    linear = qweight[:, 1, 1].contiguous()
    y = dispatch.int8_gemm(activation.as_rows(), linear, weight_scale, linear.sum(1, dtype=torch.int32), bias, out_dtype)
    expected = exact.flatten(0, 2) @ (linear.double() * weight_scale.double()[:, None]).t() + bias.double()
    assert relative_error(y, expected) <= tolerance


def test_kernels_never_wait_for_the_gpu():
    x, images = torch.randn(2048, 640, device=DEVICE).half(), torch.randn(2, 320, 32, 32, device=DEVICE).half()
    scale, zero_point = torch.ones(64, device=DEVICE), torch.zeros(64, dtype=torch.int32, device=DEVICE)
    bucket = torch.tensor([1, 2], device=DEVICE)
    linear, conv, ones = codes(640, 640), codes(320, 3, 3, 320), torch.ones(640, device=DEVICE)
    sums, halo = linear.sum(1, dtype=torch.int32), dispatch.border_sums(conv)

    def step() -> None:
        dispatch.int8_gemm(dispatch.quantize_token(x), linear, ones, sums)
        dispatch.int8_gemm(dispatch.quantize_static(x, scale, zero_point, bucket), linear, ones, sums)
        dispatch.int8_conv2d(dispatch.quantize_image(images), conv, ones[:320])
        dispatch.int8_conv2d(dispatch.quantize_static(images, scale, zero_point, bucket), conv, ones[:320], halo)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_follow_the_bucket_when_a_cuda_graph_is_replayed():
    x, qweight, ones = torch.randn(2048, 640, device=DEVICE).half(), codes(640, 640), torch.ones(640, device=DEVICE)
    scale = torch.linspace(0.01, 0.1, 64, device=DEVICE)
    bucket = torch.tensor([0, 63], device=DEVICE)

    def layer() -> torch.Tensor:
        return dispatch.int8_gemm(dispatch.quantize_static(x, scale, None, bucket), qweight, ones, out_dtype=torch.float32)

    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer()
    for values in ([5, 40], [63, 0]):
        bucket.copy_(torch.tensor(values))
        graph.replay()
        assert torch.equal(y, layer())


def test_kernels_reach_beyond_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    rows, K = 270_000, 8192  # 2.2e9 elements
    x = torch.zeros(rows, K, dtype=torch.float16, device=DEVICE)
    x[-300:] = torch.randn(300, K, device=DEVICE).half()
    whole, tail = dispatch.quantize_token(x), dispatch.quantize_token(x[-300:])
    assert torch.equal(whole.codes[-300:], tail.codes)
    qweight, ones = codes(64, K), torch.ones(64, device=DEVICE)
    assert torch.equal(dispatch.int8_gemm(whole, qweight, ones)[-300:], dispatch.int8_gemm(tail, qweight, ones))
    del x, whole
    images = codes(36, 256, 256, 960)  # 2.3e9 elements
    qweight = codes(64, 3, 3, 960)
    last = dispatch.int8_conv2d(unit_scales(images[-1:], 65536), qweight, ones, out_dtype=torch.float32)
    assert torch.equal(dispatch.int8_conv2d(unit_scales(images, 65536), qweight, ones, out_dtype=torch.float32)[-1:], last)


@pytest.mark.parametrize("name", ["reference", "dequantized"])
def test_fallbacks_give_the_kernels_result_up_to_rounding(name, monkeypatch):
    x, qweight = torch.randn(77, 333, device=DEVICE).half(), codes(130, 333)
    weight_scale = torch.rand(130, device=DEVICE) * 1e-2
    image, conv = torch.randn(2, 20, 7, 5, device=DEVICE).half(), codes(24, 3, 3, 20)

    def run() -> list[torch.Tensor]:
        linear = dispatch.int8_gemm(dispatch.quantize_token(x), qweight, weight_scale)
        return [linear, dispatch.int8_conv2d(dispatch.quantize_image(image), conv, weight_scale[:24])]

    kernels = run()
    monkeypatch.setenv(backend.OVERRIDE, name)
    backend.forget_choices()
    try:
        for fallback, kernel in zip(run(), kernels, strict=True):
            assert relative_error(fallback, kernel) <= 2e-3  # fp16 operands round once more when dequantized
    finally:
        backend.forget_choices()


# What a table may choose; each kind of loop and epilogue once.
DESIGNS = [
    Design(128, 256, 128, 8, 3, tma=True),
    Design(128, 256, 128, 8, 3, tma=True, persistent=True),
    Design(128, 256, 128, 8, 3, tma=True, split_k=3),
    Design(128, 128, 128, 8, 3, split_k=2),
    Design(256, 128, 64, 8, 3),
    Design(64, 64, 64, 4, 4),
    Design(128, 128, 128, 8, 3, tma=True),  # of 128 registers, so that two programs fit a multiprocessor
    Design(64, 128, 128, 4, 3, tma=True),
    Design(128, 128, 128, 16, 3, tma=True),
]
# What the kernels without split-K and persistent programs are tried with; descriptors fall back to pointers before Hopper.
PLAIN_DESIGNS = [design for design in DESIGNS if design.split_k == 1 and not design.persistent]


def with_second(arguments: dict, C: int) -> dict:
    """The same layer fed by two segments, as the skip connections do."""
    a = arguments["activation"]
    second = QuantizedActivation(codes(*a.codes.shape[:-1], C, seed=3), torch.full_like(a.scale, 0.013), a.zero_point, a.rows_per_scale)
    qweight = torch.cat([arguments["qweight"], codes(*arguments["qweight"].shape[:-1], C, seed=4)], -1)
    return arguments | {"second": second, "qweight": qweight}


def finished_layers() -> list[tuple]:
    """(operation, reference, arguments): a Linear and a conv with two segments, zero points, bias and addend."""
    zero = torch.tensor([-100, 20], dtype=torch.int32, device=DEVICE)
    rows = QuantizedActivation(codes(2048, 1280), torch.tensor([0.01, 0.02], device=DEVICE), zero, 1024)
    image = QuantizedActivation(codes(2, 32, 32, 640), torch.tensor([0.01, 0.02], device=DEVICE), zero, 1024)
    shared = {"weight_scale": torch.rand(1280, device=DEVICE) * 1e-3, "bias": torch.randn(1280, device=DEVICE).half()}
    gemm = {"activation": rows, "qweight": codes(1280, 1280, seed=1), "addend": torch.randn(2048, 1280, device=DEVICE).half()} | shared
    gemm["weight_sum"] = gemm["qweight"].sum(1, dtype=torch.int32)
    conv = {"activation": image, "qweight": codes(1280, 3, 3, 640, seed=1), "addend": torch.randn(2, 1280, device=DEVICE).half()} | shared
    conv["border_sums"] = dispatch.border_sums(conv["qweight"])
    two_gemm, two_conv = with_second(gemm, 640), with_second(conv, 320)
    two_gemm["weight_sum"] = torch.stack([part.sum(1, dtype=torch.int32) for part in two_gemm["qweight"].split((1280, 640), -1)])
    two_conv["border_sums"] = torch.stack([dispatch.border_sums(part) for part in two_conv["qweight"].split((640, 320), -1)])
    return [
        (dispatch.int8_gemm, int8_gemm_ref, gemm),
        (dispatch.int8_gemm, int8_gemm_ref, two_gemm),
        (dispatch.int8_conv2d, int8_conv2d_ref, conv),
        (dispatch.int8_conv2d, int8_conv2d_ref, two_conv),
    ]


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.label)
def test_int8_products_are_the_reference_for_every_design_and_repeat_bit_for_bit(design):
    for operation, reference, arguments in finished_layers():
        expected = reference(**arguments, out_dtype=torch.float32)
        with forced_design(design):
            first = operation(**arguments, out_dtype=torch.float32)
            assert relative_error(first, expected) <= 1e-6
            for _ in range(20):  # a race between the parts of K would show sooner or later
                assert torch.equal(operation(**arguments, out_dtype=torch.float32), first)


def test_split_sums_survive_a_cuda_graph_between_eager_calls():
    operation, _, arguments = finished_layers()[0]
    with forced_design(Design(128, 128, 128, 8, 3, split_k=2)):
        expected = operation(**arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = [operation(**arguments) for _ in range(3)]
        for _ in range(5):
            graph.replay()
            assert torch.equal(operation(**arguments), expected)
            assert all(torch.equal(each, expected) for each in y)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="fp8 needs sm_89 or newer")
@pytest.mark.parametrize("backend_name", ["triton", "scaled_mm"])
def test_fp8_gemm_matches_float64_up_to_the_tensor_cores_sums(backend_name):
    x, w = torch.randn(2048, 1280, device=DEVICE), torch.randn(640, 1280, device=DEVICE)
    activation = QuantizedActivation((x * 40).to(torch.float8_e4m3fn), torch.rand(2, device=DEVICE) + 0.5, None, 1024)
    qweight, weight_scale = (w * 40).to(torch.float8_e4m3fn), torch.rand(640, device=DEVICE) * 1e-3
    addend = torch.randn(2048, 640, device=DEVICE).half()
    expected = activation.dequantize(torch.float64) @ (qweight.double() * weight_scale.double()[:, None]).t() + addend.double()
    with forced_design(Design(128, 128, 128, 8, 3, backend=backend_name)):
        y = dispatch.fp8_gemm(activation, qweight, weight_scale, addend=addend)
    assert relative_error(y, expected) <= 5e-3  # Hopper sums with about 14 bits of mantissa


def test_int8_upsample_conv2d_is_the_reference_on_sdxls_upsamplers():
    for side, C in ((32, 1280), (64, 640)):
        weight = dispatch.phase_weight(torch.randn(C, 3, 3, C, device=DEVICE))
        activation = QuantizedActivation(codes(2, side, side, C), torch.tensor([0.01, 0.02], device=DEVICE), None, side * side)
        expected = int8_upsample_conv2d_ref(activation, weight, out_dtype=torch.float32)
        assert relative_error(dispatch.int8_upsample_conv2d(activation, weight, out_dtype=torch.float32), expected) <= 1e-6


def geglu_layer(M: int, C: int) -> dict:
    """Arguments of ff1 with zero points; values and gates near 1."""
    zero_point = torch.tensor([-20, 30], dtype=torch.int32, device=DEVICE)
    qweight = codes(8 * C, C, seed=1)
    return {
        "activation": QuantizedActivation(codes(M, C), torch.tensor([0.7, 1.1], device=DEVICE), zero_point, M // 2),
        "qweight": qweight,
        "weight_scale": (torch.rand(8 * C, device=DEVICE) + 0.5) * 2e-4 / C**0.5,
        "weight_sum": qweight.sum(1, dtype=torch.int32),
        "bias": torch.randn(8 * C, device=DEVICE).half(),
    }


@pytest.mark.parametrize("design", PLAIN_DESIGNS, ids=lambda design: design.label)
def test_int8_geglu_gemm_is_the_reference_on_sdxls_ff1(design):
    for M, C in ((2048, 1280), (8192, 640)):
        arguments = geglu_layer(M, C)
        expected = int8_geglu_gemm_ref(**arguments, out_dtype=torch.float32)
        with forced_design(design):
            y = dispatch.int8_geglu_gemm(**arguments)
            assert relative_error(y, expected) <= 5e-4
            assert torch.equal(dispatch.int8_geglu_gemm(**arguments), y)
            zero_point = torch.arange(-120, -56, dtype=torch.int32, device=DEVICE)
            static = StaticScale(torch.linspace(0.02, 0.05, 64, device=DEVICE), zero_point, torch.tensor([3, 40], device=DEVICE))
            found = dispatch.int8_geglu_gemm(**arguments, static=static).codes.int()
        apart = (found - int8_geglu_gemm_ref(**arguments, static=static).codes.int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() <= 1e-3


@pytest.mark.parametrize("design", PLAIN_DESIGNS, ids=lambda design: design.label)
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
def test_int8_gemm_many_is_int8_gemm_of_each_weight_also_in_a_cuda_graph(asymmetric, design):
    zero_point = torch.tensor([-20, 30], dtype=torch.int32, device=DEVICE) if asymmetric else None
    activation = QuantizedActivation(codes(2048, 1280), torch.tensor([0.01, 0.02], device=DEVICE), zero_point, 1024)
    qweights = [codes(1280, 1280, seed=seed) for seed in (1, 2, 3)]
    weights = [(q, torch.rand(1280, device=DEVICE) * 1e-3, q.sum(1, dtype=torch.int32), None) for q in qweights]
    with forced_design(design):
        expected = [dispatch.int8_gemm(activation, *weight) for weight in weights]
        found = dispatch.int8_gemm_many(activation, weights)
        assert all(torch.equal(y, each) for y, each in zip(found, expected, strict=True))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = dispatch.int8_gemm_many(activation, weights)
        for _ in range(3):
            graph.replay()
            assert all(torch.equal(y, each) for y, each in zip(found, expected, strict=True))
