"""Progressive calibration's rounding of a layer's input: the ranges seen so far, row by row where rows need it, nothing unseen."""

from __future__ import annotations

import torch

from stepquant.quant.observer import LayerObserver
from stepquant.quant.progressive import rounded_input

CONV, LINEAR = "middle_block.0.in_layers.2", "middle_block.1.transformer_blocks.0.attn1.to_q"


def observer(x: torch.Tensor, bucket: int = 5) -> LayerObserver:
    found = LayerObserver(x.shape[-1])
    found.update(x[None], [bucket])
    return found


def test_rounded_input_holds_what_was_seen_on_256_levels(generator):
    x = torch.nn.functional.silu(torch.randn(64, 16, generator=generator))
    images = x.view(2, 4, 8, 16).permute(0, 3, 1, 2).half()
    y = rounded_input(CONV, images, observer(x), 5)
    assert y.shape == images.shape and y.dtype == torch.float16
    step = float(x.max() - x.min()) / 255
    assert (y.float() - images.float()).abs().max() <= 0.52 * step + 2e-3  # fp16's rounding of 4
    assert 100 < len((y.float() / step).round().unique()) <= 256


def test_rounded_input_is_symmetric_for_inputs_of_both_signs(generator):
    x = torch.randn(64, 16, generator=generator)
    step = float(x.abs().max()) / 127
    torch.testing.assert_close(rounded_input(LINEAR, x, observer(x), 5), (x / step).round() * step)


def test_rounded_input_keeps_a_scale_per_row_for_the_prompts_rows(generator):
    x = torch.randn(1, 8, 16, generator=generator)
    x[0, 0] *= 100
    y = rounded_input(LINEAR.replace("attn1.to_q", "attn2.to_k"), x, LayerObserver(16), 5)
    step = x.abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(y, (x / step).round() * step)


def test_rounded_input_leaves_what_was_never_seen(generator):
    x = torch.randn(4, 16, generator=generator)
    assert rounded_input(LINEAR, x, observer(x, bucket=5), 6) is x
