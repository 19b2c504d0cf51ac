"""gptq_int8: less output error than plain rounding, on rows that it has not seen too; and how its second moments are gathered."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stepquant.errors import CalibrationError
from stepquant.quant.int8_rounding import gptq_int8
from stepquant.quant.sqnr import sqnr_db
from stepquant.quant.weight import dequantize_weight, quantize_weight

LAYER = "middle_block.0.in_layers.2"


def smooth_images(count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 16, 12, 12) whose neighbouring pixels and channels are alike, as a UNet's are."""
    x = torch.randn(count, 4, 6, 6, generator=generator)
    mixture = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    x = torch.einsum("oc,bchw->bohw", mixture, F.interpolate(x, scale_factor=2, mode="bilinear"))
    return F.silu(x + 0.1 * torch.randn(x.shape, generator=generator))


def moments_of(x: torch.Tensor) -> torch.Tensor:
    rows = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    return rows.t() @ rows / len(rows)


def conv_sqnr_db(x: torch.Tensor, weight: torch.Tensor, quantized) -> float:
    rounded = dequantize_weight(quantized.codes, quantized.scale, torch.float32)
    return sqnr_db(F.conv2d(x, weight, padding=1), F.conv2d(x, rounded, padding=1))


def test_gptq_int8_of_a_convolution_gains_on_images_it_has_not_seen(generator):
    seen, unseen = smooth_images(32, generator), smooth_images(32, torch.Generator().manual_seed(9))
    weight = torch.randn(24, 16, 3, 3, generator=generator)
    found, plain = gptq_int8(weight, moments_of(seen), LAYER), quantize_weight(weight, LAYER)
    assert found.codes.dtype is torch.int8 and found.codes.shape == plain.codes.shape == (24, 3, 3, 16)
    assert torch.equal(found.scale, plain.scale)
    assert int((found.codes.int() - plain.codes.int()).abs().max()) <= 8
    assert conv_sqnr_db(unseen, weight, found) > conv_sqnr_db(unseen, weight, plain) + 3


def test_gptq_int8_with_independent_inputs_rounds_to_nearest(generator):
    weight = torch.randn(8, 20, generator=generator)
    found = gptq_int8(weight, torch.eye(20), "middle_block.1.proj_in")
    assert torch.equal(found.codes, quantize_weight(weight, "plain").codes)


def test_gptq_int8_passes_one_error_on_as_the_paper_does():
    # Two inputs that are always equal: only the sum of a row's weights counts. 0.3 and 0.3 of a step round to 0 and 0 alone;
    # after the first one's error of 0.3 has gone on, the second is 0.6 and becomes 1.
    weight = torch.tensor([[127.0, 0.3, 0.3]])
    moments = torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    assert gptq_int8(weight, moments, "layer").codes.tolist() == [[127, 0, 1]]
    assert quantize_weight(weight, "layer").codes.tolist() == [[127, 0, 0]]


def test_gptq_int8_takes_inputs_that_are_never_used(generator):
    x = torch.randn(64, 20, generator=generator)
    x[:, 5] = 0
    codes = gptq_int8(torch.randn(8, 20, generator=generator), x.t() @ x, "layer").codes
    assert codes.shape == (8, 20)


@pytest.mark.parametrize("moments", [torch.eye(5), torch.full((20, 20), float("nan"))], ids=["shape", "nan"])
def test_gptq_int8_names_the_layer_whose_moments_do_not_fit(moments, generator):
    with pytest.raises(CalibrationError, match="layer: second moments of shape"):
        gptq_int8(torch.randn(8, 20, generator=generator), moments, "layer")
