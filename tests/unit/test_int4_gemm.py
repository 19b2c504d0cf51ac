"""int4_gemm: the format by hand, exact integer sums, the reference against float64, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import LayoutError
from stepquant.kernels import dispatch
from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.design import Design
from stepquant.kernels.int4_gemm import dequantized_int4_gemm, int4_gemm_ref
from stepquant.kernels.int4_weight import expanded_codes, paired_scales
from stepquant.kernels.tables import forced_design

SHAPES = [(1, 64, 64), (77, 130, 192), (154, 640, 2048)]  # M, N, K: whole and half blocks of 128; the last is SDXL's cross-attention K
# Relative norm to float64: what rounding to the dtype alone gives, and a margin of 2.5.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def layer(shape: tuple[int, int, int], generator: torch.Generator, entries: int = 1, asymmetric: bool = True) -> dict:
    """Arguments of int4_gemm with random nibbles and scales; `entries` activation scales."""
    M, N, K = shape
    qweight = torch.randint(0, 256, (N, -(-K // 128) * 64), generator=generator, dtype=torch.uint8)
    group_scale = paired_scales(torch.randint(-15, 16, (K // 64, N), generator=generator, dtype=torch.int8))
    zero_point = torch.randint(-128, 128, (entries,), generator=generator, dtype=torch.int32) if asymmetric else None
    codes = torch.randint(-128, 128, (M, K), generator=generator, dtype=torch.int8)
    return {
        "activation": QuantizedActivation(codes, torch.rand(entries, generator=generator) * 0.01 + 0.001, zero_point, M // entries),
        "qweight": qweight,
        "group_scale": group_scale,
        "weight_scale": torch.rand(N, generator=generator) * 0.001 + 0.0001,
        "weight_sum": expanded_codes(qweight, group_scale, K).sum(1, dtype=torch.int32),
        "bias": torch.randn(N, generator=generator),
    }


def to_device(arguments: dict, device: torch.device) -> dict:
    a = arguments["activation"]
    if isinstance(a, QuantizedActivation):
        zero_point = None if a.zero_point is None else a.zero_point.to(device)
        a = QuantizedActivation(a.codes.to(device), a.scale.to(device), zero_point, a.rows_per_scale)
    else:
        a = a.to(device)
    return {"activation": a} | {k: None if v is None else v.to(device) for k, v in arguments.items() if k != "activation"}


def expected_float64(arguments: dict, K: int) -> torch.Tensor:
    """The same layer on dequantized operands, in float64."""
    codes = expanded_codes(arguments["qweight"], arguments["group_scale"], K)
    weight = codes.double() * arguments["weight_scale"].double()[:, None]
    a = arguments["activation"]
    if isinstance(a, QuantizedActivation):
        zero_point = torch.zeros_like(a.scale) if a.zero_point is None else a.zero_point
        a = (a.codes.double() - a.per_row(zero_point)[:, None]) * a.per_row(a.scale).double()[:, None]
    y = a.double() @ weight.t()
    return y if arguments["bias"] is None else y + arguments["bias"].double()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().double() - expected.cpu().double()).norm() / expected.double().norm())


def test_int4_weight_format_by_hand():
    # One output channel, 192 inputs: three groups, so half of the second block is empty.
    qweight = torch.full((1, 128), 0x88, dtype=torch.uint8)  # code 0 everywhere
    qweight[0, 0] = 0x9F  # channel 0: 15 - 8 = 7; channel 64: 9 - 8 = 1
    qweight[0, 63] = 0x08  # channel 63: 0; channel 127: -8
    qweight[0, 64] = 0x86  # channel 128: -2
    scales = torch.tensor([[3], [-15], [2]], dtype=torch.int8)
    paired = paired_scales(scales)
    assert paired.tolist() == [[3 + (-15 << 16)], [2]]
    codes = expanded_codes(qweight, paired, 192)
    assert codes.shape == (1, 192)
    found = {int(k): int(codes[0, k]) for k in codes[0].nonzero()}
    assert found == {0: 21, 64: -15, 127: 120, 128: -4}


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("out_dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int4_gemm_reference_matches_float64(shape, out_dtype, asymmetric, generator):
    arguments = layer(shape, generator, asymmetric=asymmetric)
    y = int4_gemm_ref(**arguments, out_dtype=out_dtype)
    assert y.dtype == out_dtype
    assert relative_error(y, expected_float64(arguments, shape[2])) <= TOLERANCE[out_dtype]


@pytest.mark.parametrize("call", [int4_gemm_ref, dequantized_int4_gemm])
def test_int4_gemm_of_float_rows_matches_float64(call, generator):
    arguments = layer((77, 130, 192), generator) | {"activation": torch.randn(77, 192, generator=generator)}
    assert relative_error(call(**arguments, out_dtype=torch.float32), expected_float64(arguments, 192)) <= 5e-6


def test_int4_gemm_dequantized_matches_the_reference_with_what_follows(generator):
    arguments = layer((78, 130, 192), generator, entries=3)
    extras = {"addend": torch.randn(78, 130, generator=generator), "out_scale": torch.full((3,), 0.05)}
    fallback, reference = (call(**arguments, out_dtype=torch.float32, **extras) for call in (dequantized_int4_gemm, int4_gemm_ref))
    assert (fallback.codes.int() - reference.codes).abs().max() <= 1
    assert (fallback.codes != reference.codes).float().mean() <= 1e-3


@pytest.mark.parametrize("shape", [*SHAPES[:2], (5, 70, 1024), (300, 140, 320)], ids=str)
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_int4_gemm_kernel_sums_equal_the_exact_ones_bit_for_bit(shape, tma, generator, triton_device):
    arguments = layer(shape, generator, asymmetric=False)
    a = arguments["activation"]
    # With scales of 1 the fp32 result is the int32 sum, as long as that is below 2^24.
    ones = QuantizedActivation(a.codes.clamp(-90, 90), torch.ones(1), None, a.rows)
    arguments |= {"activation": ones, "weight_scale": torch.ones(shape[1]), "bias": None}
    exact = ones.codes.long() @ expanded_codes(arguments["qweight"], arguments["group_scale"], shape[2]).long().t()
    assert exact.abs().max() < 2**24
    with forced_design(Design(32, 64, 128, 4, 3, tma=tma)):
        y = dispatch.int4_gemm(**to_device(arguments, triton_device), out_dtype=torch.float32)
    assert torch.equal(y.cpu().long(), exact)


@pytest.mark.parametrize("out_dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("entries", [1, 3, 78], ids=["one scale", "per sample", "per token"])
def test_int4_gemm_kernel_matches_the_reference(entries, out_dtype, generator, triton_device):
    arguments = layer((78, 130, 192), generator, entries)
    y = dispatch.int4_gemm(**to_device(arguments, triton_device), out_dtype=out_dtype)
    assert y.dtype == out_dtype
    assert relative_error(y, expected_float64(arguments, 192)) <= TOLERANCE[out_dtype]
    if out_dtype == torch.float32:  # the interpreter truncates to bf16 where a GPU rounds, so others differ
        assert relative_error(y, int4_gemm_ref(**arguments, out_dtype=out_dtype)) <= 1e-6


@pytest.mark.parametrize("rows_per", [1, 26, 78], ids=["residual", "per image", "one row"])
def test_int4_gemm_kernel_adds_and_stores_codes_as_the_reference(rows_per, generator, triton_device):
    arguments = to_device(layer((78, 130, 192), generator, entries=3), triton_device)
    extras = {
        "addend": torch.randn(78 // rows_per, 130, generator=generator),
        "out_scale": torch.tensor([0.02, 0.05, 0.1]),
        "out_zero_point": torch.tensor([-5, 0, 17], dtype=torch.int32),
    }
    extras = {name: tensor.to(triton_device) for name, tensor in extras.items()}
    with forced_design(Design(128, 32, 128, 4, 3)):  # 128 sums a thread: stored in halves
        y = dispatch.int4_gemm(**arguments, out_dtype=torch.float32, **extras)
    reference = int4_gemm_ref(**arguments, out_dtype=torch.float32, **extras)
    assert (y.codes.int() - reference.codes).abs().max() <= 1
    assert (y.codes != reference.codes).float().mean() <= 1e-3


def test_int4_gemm_result_is_nan_in_the_row_that_was_not_finite(generator, triton_device):
    x = torch.randn(20, 64, generator=generator)
    x[4, 9] = float("nan")
    arguments = to_device(layer((20, 32, 64), generator, asymmetric=False), triton_device)
    arguments["activation"] = dispatch.quantize_token(x.to(triton_device))
    y = dispatch.int4_gemm(**arguments)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [4]
    assert y[4].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(32, 65, dtype=torch.uint8)}, r"\(32, 65\) for 192 terms.*uint8 \(32, 128\), is needed"),
        ({"qweight": torch.zeros(32, 128, dtype=torch.int8)}, "int8"),
        ({"group_scale": torch.zeros(3, 32, dtype=torch.int8)}, r"int8 \(3, 32\); contiguous int32 \(2, 32\) is needed"),
        ({"bias": torch.zeros(31)}, r"bias of shape \(31,\); \(32,\) is needed"),
        ({"weight_sum": None}, "zero point without weight_sum"),
        ({"activation": torch.zeros(20, 100)}, "for 100 terms per output; a multiple of 64"),
        ({"activation": torch.zeros(2, 3, 192)}, r"rows \(2, 3, 192\)"),
    ],
    ids=["K differs", "signed bytes", "stored scales", "short bias", "no weight_sum", "uneven K", "images"],
)
def test_int4_gemm_refuses_operands_that_do_not_fit(change, message, generator):
    with pytest.raises(LayoutError, match=message):
        int4_gemm_ref(**layer((20, 32, 192), generator) | change)
