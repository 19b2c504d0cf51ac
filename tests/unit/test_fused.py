"""Fused norm, gate, quantization and product: the layers' results, one quantization for all of them, and no loss in dB."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from stepquant.hosts import compute, fused
from stepquant.hosts.compute import LayerTensors, sums_of_codes
from stepquant.hosts.fused import NormTensors
from stepquant.kernels import dispatch
from stepquant.kernels.dispatch import StaticScale
from stepquant.quant.int4 import quantize_int4
from stepquant.quant.mac_counter import MacCounter
from stepquant.quant.scheme import FP8, ActivationMode, Scheme
from stepquant.quant.sqnr import sqnr_db
from stepquant.quant.weight import dequantize_weight, quantize_weight

MODES = ["token", "static", "static_asymmetric"]
BUCKET = torch.tensor([3, 40])
# Quantization noise, 40 dB down, differs by chance when an input moves by fp16's rounding, 70 dB down. Measured: up to 0.02.
CHANCE_DB = 0.05

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def layer_of(
    shape: tuple[int, ...], mode: str, absmax: float = 5.0, lowest: float = -5.0, seed: int = 0, counter: MacCounter | None = None
) -> LayerTensors:
    """A layer with random weights; static tables fit inputs in +-absmax, asymmetric ones from lowest to absmax."""
    generator = torch.Generator().manual_seed(seed)
    weight = quantize_weight(torch.randn(shape, generator=generator), f"layer {seed}")
    asymmetric = mode == "static_asymmetric"
    activation = ActivationMode("static" if asymmetric else mode)
    scale = zero_point = None
    if activation is ActivationMode.STATIC:
        scale = torch.full((64,), (absmax - lowest) / 255 if asymmetric else absmax / 127)
        scale[40:] *= 1.1
    if asymmetric:
        zero_point = (-128 - lowest / scale).round().int()
    scheme = Scheme(activation=activation, symmetric=not asymmetric)
    sums = sums_of_codes(weight.codes) if asymmetric else None
    bias = torch.randn(shape[0], generator=generator).half()
    return LayerTensors(f"layer {seed}", scheme, weight.codes, weight.scale, bias, sums, scale, zero_point, counter)


def norm_of(K: int, eps: float = 1e-5) -> NormTensors:
    weight, bias = torch.randn(2, K, generator=torch.Generator().manual_seed(5))
    return NormTensors((1 + 0.2 * weight).half(), (0.1 * bias).half(), eps)


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def float64_weight(layer: LayerTensors) -> torch.Tensor:
    """The weight as its codes hold it, so that what is measured is the activation's error."""
    return dequantize_weight(layer.qweight, layer.weight_scale, torch.float64)


def exact_norm(x: torch.Tensor, norm: NormTensors, silu: bool = False) -> torch.Tensor:
    y = functional.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    return functional.silu(y) if silu else y


def stored_scale(layer: LayerTensors) -> StaticScale | None:
    return StaticScale(layer.act_scale, layer.act_zero_point, BUCKET) if layer.is_static else None


def assert_no_loss(fused: torch.Tensor, unfused: torch.Tensor, exact: torch.Tensor, floor_db: float) -> None:
    assert fused.shape == exact.shape and fused.dtype == torch.float16
    assert sqnr_db(exact, fused) >= max(sqnr_db(exact, unfused) - CHANCE_DB, floor_db)


@pytest.mark.parametrize("mode", MODES)
def test_layer_norm_loses_nothing_against_norm_then_layer(mode):
    x, norm = 2 * images(2, 64, 320) + 1, norm_of(320)
    layers = [layer_of((96, 320), mode, seed=seed) for seed in range(3)]
    codes, kept = fused.layer_norm(x, norm, stored_scale(layers[0]))
    assert kept is None
    normalised = functional.layer_norm(x, (320,), norm.weight, norm.bias, norm.eps)
    exact = functional.layer_norm(x.double(), (320,), norm.weight.double(), norm.bias.double(), norm.eps)
    for layer in layers:
        expected = functional.linear(exact, float64_weight(layer), layer.bias.double())
        y = fused.product(codes, layer, x.dtype).view(2, 64, 96)
        assert_no_loss(y, compute.linear(normalised, layer, BUCKET), expected, 35)


@pytest.mark.parametrize("mode", MODES)
def test_geglu_loses_nothing_against_geglu_then_layer(mode):
    x, layer = images(2, 64, 640), layer_of((96, 320), mode, absmax=8.0, lowest=-8.0)
    value, gate = x.chunk(2, -1)
    exact = functional.linear(value.double() * functional.gelu(gate.double()), float64_weight(layer), layer.bias.double())
    unfused = compute.linear(value * functional.gelu(gate), layer, BUCKET)
    y = fused.product(fused.geglu(x, stored_scale(layer)), layer, x.dtype).view(2, 64, 96)
    assert_no_loss(y, unfused, exact, 25)


@pytest.mark.parametrize("widths", [(64,), (40, 24)], ids=["one", "skip"])
@pytest.mark.parametrize("mode", MODES)
def test_group_norm_silu_loses_nothing_against_norm_silu_conv(mode, widths):
    segments = [2 * images(2, width, 25, 23, seed=width) - 1 for width in widths]
    norm, layer = norm_of(64), layer_of((48, 64, 3, 3), mode, lowest=-0.3)
    joined = torch.cat(segments, 1)
    exact = functional.conv2d(exact_norm(joined, norm, silu=True), float64_weight(layer), layer.bias.double(), 2, 1)
    activated = functional.silu(functional.group_norm(joined, 32, norm.weight, norm.bias, norm.eps))
    y = fused.convolution(fused.group_norm_silu(segments, norm, stored_scale(layer), False), layer, torch.float16, stride=2)
    assert_no_loss(y, compute.conv2d(activated, layer, BUCKET, 2, 1), exact, 30)


@pytest.mark.parametrize("stride", [1, 2])
def test_dynamic_convolution_after_silu_has_a_zero_point_fused_or_not_and_gains_by_it(stride):
    x, norm, symmetric = 2 * images(2, 64, 9, 7) - 1, norm_of(64), layer_of((48, 64, 3, 3), "token")
    asymmetric = replace(
        symmetric, name="input_blocks.4.0.in_layers.2", scheme=Scheme(symmetric=False), weight_sums=sums_of_codes(symmetric.qweight)
    )
    exact = functional.conv2d(exact_norm(x, norm, silu=True), float64_weight(symmetric), symmetric.bias.double(), stride, 1)
    activated = functional.silu(functional.group_norm(x, 32, norm.weight, norm.bias, norm.eps))
    unfused = compute.conv2d(activated, asymmetric, BUCKET, stride, 1)
    assert sqnr_db(exact, unfused) > sqnr_db(exact, compute.conv2d(activated, symmetric, BUCKET, stride, 1)) + 4
    zeros = compute.conv2d(torch.zeros_like(activated), asymmetric, BUCKET, stride, 1)
    assert torch.equal(zeros, asymmetric.bias.view(1, -1, 1, 1).expand_as(zeros))  # at the borders too: padding is the zero point
    addend = torch.zeros(2, 48).half()
    held = fused.activated_convolution(x, norm, None, asymmetric, True, addend, stride, 1)
    assert_no_loss(held, unfused, exact, 30)
    # A layer without sums of its codes, or with channel groups, cannot correct for a zero point.
    assert replace(asymmetric, weight_sums=None).dynamic_low is None and symmetric.dynamic_low is None


@pytest.mark.parametrize("kernel", ["linear", "conv1x1"])
@pytest.mark.parametrize("mode", MODES)
def test_group_norm_loses_nothing_against_norm_then_layer(mode, kernel):
    x, norm = 2 * images(2, 64, 24, 23) - 1, norm_of(64, 1e-6)
    layer = layer_of((48, 64) if kernel == "linear" else (48, 64, 1, 1), mode)
    rows = exact_norm(x, norm).permute(0, 2, 3, 1).reshape(2, 552, 64)
    exact = functional.linear(rows, float64_weight(layer).reshape(48, 64), layer.bias.double())
    normalised = functional.group_norm(x, 32, norm.weight, norm.bias, norm.eps)
    unfused = compute.conv2d(normalised, layer, BUCKET, 1, 0) if kernel == "conv1x1" else None
    if unfused is None:
        unfused = compute.linear(normalised.permute(0, 2, 3, 1), layer, BUCKET).permute(0, 3, 1, 2)
    unfused = unfused.permute(0, 2, 3, 1).reshape(2, 552, 48)
    y = fused.product(fused.group_norm(x, norm, stored_scale(layer)), layer, x.dtype).view(2, 552, 48)
    assert_no_loss(y, unfused, exact, 30)


@pytest.mark.parametrize("mode", MODES)
def test_product_adds_a_residual_before_its_one_rounding(mode):
    x, residual, layer = images(2, 8, 320), images(2, 8, 96, seed=2), layer_of((96, 320), mode)
    codes = fused.quantize(x, stored_scale(layer))
    y = fused.product(codes, layer, torch.float16, residual.view(16, 96))
    assert torch.equal(y, (fused.product(codes, layer, torch.float32) + residual.view(16, 96)).half())


@pytest.mark.parametrize("shape", [(2, 48), (2, 48, 9, 7)], ids=["time embedding", "residual"])
def test_convolution_adds_a_vector_per_image_or_a_residual(shape):
    x, layer = images(2, 64, 9, 7), layer_of((48, 64, 3, 3), "token")
    addend = images(*shape, seed=2)
    addend = addend.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else addend
    codes = dispatch.quantize_image(x)
    y = fused.convolution(codes, layer, torch.float16, addend=addend)
    expected = fused.convolution(codes, layer, torch.float32) + addend.view(*shape[:2], *(shape[2:] or (1, 1)))
    assert torch.equal(y, expected.half())


def test_products_on_shared_codes_are_counted_one_by_one():
    counter = MacCounter()
    layers = [layer_of((96, 320), "token", seed=seed, counter=counter) for seed in range(3)]
    codes, _ = fused.layer_norm(images(2, 8, 320), norm_of(320), None)
    for layer in layers:
        fused.product(codes, layer, torch.float16)
    assert counter.integer_by_layer == {f"layer {seed}": 16 * 96 * 320 for seed in range(3)}


def test_layer_norm_is_norm_then_layer_bit_for_bit_when_nothing_is_rounded_between():
    x, norm, layer = images(2, 8, 320).float(), norm_of(320), layer_of((96, 320), "token")
    codes, kept = fused.layer_norm(x, norm, None, keep_float=True)
    normalised = functional.layer_norm(x, (320,), norm.weight.float(), norm.bias.float(), norm.eps)
    assert torch.equal(kept, normalised)
    assert torch.equal(fused.product(codes, layer, x.dtype).view(2, 8, 96), compute.linear(normalised, layer, BUCKET))


def test_layer_norm_keeps_the_floats_that_a_branch_needs():
    x, norm = images(2, 8, 320), norm_of(320)
    _, kept = fused.layer_norm(x, norm, None, keep_float=True)
    exact = functional.layer_norm(x.double(), (320,), norm.weight.double(), norm.bias.double(), norm.eps)
    assert kept.shape == x.shape and kept.dtype == x.dtype
    assert (kept.double() - exact).norm() <= 5e-4 * exact.norm()


def test_fused_layers_run_the_kernels(triton_device):
    layer, norm = layer_of((32, 64), "static_asymmetric"), norm_of(64)
    x = images(2, 4, 64)
    normalised = functional.layer_norm(x.float(), (64,), norm.weight.float(), norm.bias.float(), norm.eps)
    exact = functional.linear(normalised.double(), float64_weight(layer), layer.bias.double())
    moved = LayerTensors(
        **{name: value.to(triton_device) if isinstance(value, torch.Tensor) else value for name, value in vars(layer).items()}
    )
    on_device = NormTensors(norm.weight.to(triton_device), norm.bias.to(triton_device), norm.eps)
    static = StaticScale(moved.act_scale, moved.act_zero_point, BUCKET.to(triton_device))
    codes, _ = fused.layer_norm(x.to(triton_device), on_device, static)
    y = fused.product(codes, moved, x.dtype).view(2, 4, 32)
    assert sqnr_db(exact, y.cpu()) == pytest.approx(sqnr_db(exact, compute.linear(normalised, layer, BUCKET)), abs=0.1)


def test_quantize_takes_attention_output_without_a_copy(triton_device):
    B, heads, T, d = 2, 3, 5, 16
    # As attention returns it: computed (B, T, heads, d), seen as (B, heads, T, d).
    attention = images(B, T, heads, d).to(triton_device).transpose(1, 2)
    rows = attention.transpose(1, 2).reshape(B * T, heads * d)
    assert rows.data_ptr() == attention.data_ptr()
    assert torch.equal(dispatch.quantize_token(rows).codes, dispatch.quantize_token(rows.contiguous()).codes)


def test_quantize_takes_rows_inside_wider_ones_without_a_copy(triton_device):
    wide = images(10, 3 * 48).to(triton_device)  # q, k and v side by side
    scale, bucket = torch.full((64,), 0.02, device=triton_device), torch.tensor([3], device=triton_device)
    for part in wide.split(48, 1):
        assert torch.equal(dispatch.quantize_token(part).codes, dispatch.quantize_token(part.contiguous()).codes)
        strided, packed = (dispatch.quantize_static(rows, scale, None, bucket).codes for rows in (part, part.contiguous()))
        assert torch.equal(strided, packed)


def feed_forward_layer(N: int, K: int, seed: int, scheme: Scheme) -> LayerTensors:
    generator = torch.Generator().manual_seed(seed)
    weight = quantize_weight(torch.randn(N, K, generator=generator) / K**0.5, "layer", dispatch.FP8 if scheme.is_fp8 else torch.int8)
    return LayerTensors("layer", scheme, weight.codes, weight.scale, torch.randn(N, generator=generator).half())


BOTH_KINDS = pytest.mark.parametrize("first", [FP8, Scheme()], ids=["fp8 before", "int8 before"])


@BOTH_KINDS
def test_fp8_scale_between_feed_forward_layers_bounds_every_value(first):
    norm, projection, generator = norm_of(96), feed_forward_layer(160, 96, 1, first), torch.Generator().manual_seed(2)
    largest = 448 * float(fused.bounded_geglu_scale(norm, projection).scale[0])
    inputs = [torch.randn(64, 96, generator=generator) * 100, torch.eye(96) * 1e4]
    # The rows that come nearest: along each gate's own weights.
    inputs.append(dequantize_weight(projection.qweight, projection.weight_scale, torch.float32)[80:] / norm.weight.float())
    for x in inputs:
        codes, _ = fused.layer_norm(x, norm, None, codes=projection.code_dtype)
        z = fused.product(codes, projection, torch.float32)
        value, gate = z.chunk(2, 1)
        assert float((value * functional.gelu(gate)).abs().max()) <= largest


@BOTH_KINDS
def test_fp8_feed_forward_is_as_near_with_one_scale_for_all_rows_as_per_token(first, triton_device):
    projection, second = feed_forward_layer(160, 96, 1, first), feed_forward_layer(96, 80, 2, FP8)
    norm, generator = norm_of(96), torch.Generator().manual_seed(3)
    x, residual = (torch.randn(2, 33, 96, generator=generator) for _ in range(2))
    y = functional.layer_norm(x.double(), (96,), norm.weight.double(), norm.bias.double(), norm.eps)
    value, gate = functional.linear(y, float64_weight(projection), projection.bias.double()).chunk(2, -1)
    exact = functional.linear(value * functional.gelu(gate), float64_weight(second), second.bias.double()) + residual
    bounding = fused.bounded_geglu_scale(norm, projection)
    errors = []
    for static in (None, bounding):
        result = fused.feed_forward(x, norm, (None, static), projection, second, residual)
        errors.append(sqnr_db(exact - residual, result.double() - residual))
    # A row's own scale puts its largest values at the end of a binade, where e4m3 errs least: 0.7 and 1.8 dB measured here.
    assert errors[1] > errors[0] - 2.5
    assert errors[1] > 29


@pytest.mark.parametrize("is_int4", [False, True], ids=["int8", "int4"])
def test_feed_forward_s_values_are_quantized_a_part_at_a_time_with_the_same_codes(is_int4, monkeypatch):
    """What is never whole cannot take memory: at 1024x1024 20 MiB instead of 40, the largest tensor of a UNet call."""
    weight = torch.randn(2 * 48, 64, generator=torch.Generator().manual_seed(2))
    if is_int4:
        four = quantize_int4(weight, "x")
        layer = LayerTensors("x", Scheme(weight_bits=4), four.packed(), four.scale, group_scale=dispatch.paired_scales(four.group_scale))
    else:
        layer = layer_of((2 * 48, 64), "token")
    rows = dispatch.quantize_token(images(10, 64))
    whole = fused.gated_product(rows, layer, torch.float16, None)
    sizes = []
    quantize = dispatch.quantize_token
    monkeypatch.setattr(dispatch, "quantize_token", lambda x, *rest: (sizes.append(len(x)), quantize(x, *rest))[1])
    monkeypatch.setattr(fused, "MOST_GATED_BYTES", 4 * 48 * 2)
    parts = fused.gated_product(rows, layer, torch.float16, None)
    assert sizes == [4, 4, 2]
    assert torch.equal(parts.codes, whole.codes) and torch.equal(parts.scale, whole.scale) and parts.rows_per_scale == 1


@pytest.mark.parametrize("mode", MODES)
def test_gated_values_are_those_of_norm_projection_and_geglu(mode):
    layer, norm, x = layer_of((2 * 48, 64), mode), norm_of(64), images(2, 5, 64)
    exact = functional.layer_norm(x.double(), (64,), norm.weight.double(), norm.bias.double(), norm.eps) @ float64_weight(layer).t()
    value, gate = (exact + layer.bias.double()).chunk(2, -1)
    found = fused.gated_values(x, norm, stored_scale(layer), layer)
    assert found.shape == (2, 5, 48) and found.dtype == torch.float16
    assert sqnr_db(value * functional.gelu(gate), found) > (30 if mode == "token" else 25)
