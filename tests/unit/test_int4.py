"""4-bit weights: what a step loses, the packed form, better scales than absmax, and refusals that name the layer."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import WeightError
from stepquant.kernels.int4_weight import expanded_codes, paired_scales, stored_scales
from stepquant.quant.int4 import Int4Weight, can_be_int4, int8_codes, quantize_int4
from stepquant.quant.sqnr import sqnr_db


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _absmax(weight: torch.Tensor) -> torch.Tensor:
    """Rounded to codes in [-7, 7] of each group's absmax, with fp32 scales: what is usual."""
    groups = weight.unflatten(1, (-1, 64))
    scale = groups.abs().amax(2, keepdim=True) / 7
    return ((groups / scale).round() * scale).flatten(1)


def test_quantize_int4_worked_example():
    # The largest weight of a group, -4, becomes code -8; scale * group_scale is what one code is worth.
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([-4.0, 2.0, 0.5, -1.0])
    quantized = quantize_int4(weight, "layer")
    assert quantized.codes[0, :5].tolist() == [-8, 4, 1, -2, 0]
    assert quantized.group_scale.tolist() == [[15]]
    assert quantized.scale.item() == pytest.approx(4 / 120)
    assert torch.allclose(quantized.dequantize(), weight)


def test_quantize_int4_negates_the_group_scale_when_the_largest_weight_is_positive():
    quantized = quantize_int4(-torch.eye(1, 64) * -4, "layer")
    assert quantized.codes[0, 0] == -8
    assert quantized.group_scale.item() == -15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_quantize_int4_codes_and_scales_make_int8_products(dtype):
    quantized = quantize_int4(_normal(70, 192).to(dtype), "layer")
    assert -8 <= quantized.codes.min() <= quantized.codes.max() <= 7
    assert 1 <= quantized.group_scale.abs().min() <= quantized.group_scale.abs().max() <= 15
    products = quantized.codes.int().unflatten(1, (-1, 64)) * quantized.group_scale.t()[:, :, None]
    assert products.abs().max() <= 127


def test_quantize_int4_beats_absmax_rounding_by_a_decibel():
    # N(0, 1), 1024 x 4096: absmax in [-7, 7] 19.4 dB, this 20.8 dB measured.
    weight = _normal(1024, 4096)
    assert sqnr_db(weight, quantize_int4(weight, "layer").dequantize()) > 20.5
    assert 19 < sqnr_db(weight, _absmax(weight)) < 19.6


def test_quantize_int4_spares_the_channels_that_count():
    weight, importance = _normal(64, 256), torch.ones(256)
    importance[::8] = 100
    plain, weighted = quantize_int4(weight, "layer"), quantize_int4(weight, "layer", importance)

    def loss(quantized: Int4Weight) -> float:
        return float(((quantized.dequantize() - weight).square() * importance).sum())

    assert loss(weighted) < 0.9 * loss(plain)


def test_quantize_int4_keeps_outlier_channels_and_groups_apart():
    weight = _normal(64, 256)
    weight[3] *= 1000
    weight[:, :64] *= 5
    restored = quantize_int4(weight, "layer").dequantize()
    others = [row for row in range(64) if row != 3]
    assert sqnr_db(weight[others, 64:], restored[others, 64:]) > 17.5


def test_quantize_int4_maps_zeros_to_zeros():
    weight = _normal(4, 128)
    weight[2] = 0
    weight[1, 64:] = 0
    restored = quantize_int4(weight, "layer").dequantize(torch.float16)
    assert not restored[2].any()
    assert not restored[1, 64:].any()


@pytest.mark.parametrize("K", [64, 128, 320, 640])
def test_packed_weight_is_what_the_kernels_expand(K):
    quantized = quantize_int4(_normal(30, K), "layer")
    packed = quantized.packed()
    assert packed.shape == (30, -(-K // 128) * 64)
    codes = expanded_codes(packed, paired_scales(quantized.group_scale), K)
    products = quantized.codes.unflatten(1, (-1, 64)) * quantized.group_scale.t()[:, :, None]
    assert torch.equal(codes, products.flatten(1))
    assert torch.equal(int8_codes(packed, quantized.group_scale), codes)
    assert torch.equal(stored_scales(paired_scales(quantized.group_scale), K), quantized.group_scale)


def test_can_be_int4_takes_linears_with_whole_groups():
    assert can_be_int4((1280, 640))
    assert not can_be_int4((1280, 330))
    assert not can_be_int4((1280, 640, 1, 1))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4, 330), r"mid\.to_q: K = 330 is no multiple of group_size 64\. Choose int8"),
        (torch.zeros(4, 64, 3, 3), r"mid\.to_q: a convolution's weight \(4, 64, 3, 3\); 4 bits are for Linears"),
        (torch.full((4, 64), torch.nan), r"mid\.to_q: 256 of 256 weights are NaN"),
    ],
    ids=["uneven K", "convolution", "NaN"],
)
def test_quantize_int4_names_the_layer_that_it_refuses(weight, message):
    with pytest.raises(WeightError, match=message):
        quantize_int4(weight, "mid.to_q")
