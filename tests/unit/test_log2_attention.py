"""log2 attention: the paper's formula in float64, start tokens kept apart, a scale per prompt; kernels against references."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from stepquant.errors import LayoutError, SchemeError
from stepquant.kernels import dispatch
from stepquant.kernels.log2_attention import attention_operands, int8_attention_ref, log2_attention_ref
from stepquant.quant.log2_attention import AttentionMode, AttentionScheme, log2_quantized, start_tokens
from stepquant.quant.sqnr import sqnr_db

# B, h, Tq, T, d; the demo model's and SDXL's head dims, lengths that 64 does not divide
SHAPES = [(2, 3, 100, 77, 64), (1, 2, 130, 130, 64), (2, 2, 17, 154, 40), (1, 1, 1, 77, 32)]


def inputs(shape: tuple[int, ...], generator: torch.Generator, sharpness: float = 3.0) -> tuple[torch.Tensor, ...]:
    B, h, Tq, T, d = shape
    q = torch.randn(B, h, Tq, d, generator=generator) * sharpness
    return q, torch.randn(B, h, T, d, generator=generator), torch.randn(B, h, T, d, generator=generator)


def starts(shape: tuple[int, ...]) -> torch.Tensor | None:
    B, _, _, T, _ = shape
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[:, ::77] = True
    return mask if T % 77 == 0 else None


def in_float64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bits: int, start: torch.Tensor | None) -> torch.Tensor:
    """The formula on the quantized inputs, in float64, with the whole map at once."""
    o = attention_operands(q, k, v, quantize_value=True, start=start)
    q64, k64 = (codes.double() * scale.double()[..., None] for codes, scale in ((o.q, o.q_scale), (o.k, o.k_scale)))
    p = torch.softmax(q64 @ k64.transpose(1, 2) * math.log(2), -1).view(*q.shape[:3], -1)
    kept = torch.zeros_like(p[:, :1, :1], dtype=torch.bool) if start is None else start[:, None, None]
    scale = p.masked_fill(kept, 0).amax((1, 2, 3), keepdim=True)
    p = torch.where(kept, p, log2_quantized(p, scale, bits))
    value = o.v.double() * o.v_scale.double()[:, None] + (0 if o.v_start is None else o.v_start.double())
    return p @ value.view(v.shape)


def test_log2_quantized_follows_the_papers_formula_on_a_worked_example():
    p = torch.tensor([1.0, 0.5, 0.3, 0.2, 2.0**-20, 0.0])
    # -log2: 0, 1, 1.74, 2.32, 20, inf; four bits end at 15
    assert log2_quantized(p, torch.tensor(1.0), 4).tolist() == [1.0, 0.5, 0.25, 0.25, 2.0**-15, 2.0**-15]
    assert log2_quantized(p[2:4], torch.tensor(0.3), 4).tolist() == pytest.approx([0.3, 0.15])


def test_start_tokens_are_found_by_value_in_every_chunk(generator):
    context = torch.randn(2, 154, 48, generator=generator)
    context[0, 0] *= 80
    context[0, 90] *= 80  # not the first of its chunk
    context[1, 77] *= 80
    assert start_tokens(context).nonzero().tolist() == [[0, 0], [0, 90], [1, 77]]


@pytest.mark.parametrize("T", [64, 78, 4096])
def test_start_tokens_are_none_where_there_are_no_text_chunks(T):
    assert start_tokens(torch.zeros(1, T, 8)) is None


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log2_attention_reference_matches_float64(shape, bits, generator):
    arguments = (*inputs(shape, generator), bits, starts(shape))
    # A probability at a tie may fall to either side in fp32: 1 in 10^5 codes would leave 50 dB.
    assert sqnr_db(in_float64(*arguments), log2_attention_ref(*arguments)) > 50


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log2_attention_kernel_matches_float64(shape, bits, generator, triton_device):
    q, k, v = inputs(shape, generator)
    start = starts(shape)
    moved = [None if x is None else x.to(triton_device) for x in (q, k, v, start)]
    y = dispatch.log2_attention(*moved[:3], bits, moved[3])
    assert y.shape == q.shape and y.dtype == q.dtype
    assert sqnr_db(in_float64(q, k, v, bits, start), y.cpu()) > 50


def test_log2_attention_keeps_start_tokens_exact(generator):
    q, k, v = inputs((1, 2, 40, 77, 64), generator)
    k[:, :, 0], v[:, :, 0] = q.mean(2) * 4, v[:, :, 0] * 80  # takes most of the attention, and the values' scale
    start = torch.zeros(1, 77, dtype=torch.bool)
    start[0, 0] = True
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    apart, together = (sqnr_db(exact, log2_attention_ref(q, k, v, 8, mask)) for mask in (start, None))
    assert apart > together + 3


def test_log2_attention_of_a_prompt_does_not_depend_on_its_batch(generator):
    q, k, v = inputs((2, 2, 30, 77, 64), generator)
    q[1] *= 0.01  # a flat map, whose largest probability is a seventieth of the other's
    together = log2_attention_ref(q, k, v, 4)
    assert torch.equal(together[1:], log2_attention_ref(q[1:], k[1:], v[1:], 4))


def test_log2_attention_is_no_better_with_more_bits_than_a_softmax_needs(generator):
    # One code per octave, whatever the bits: the reason why the mode is for low bits (research/algorithms.md 1.10, pitfall 5).
    q, k, v = inputs((1, 2, 60, 77, 64), generator)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    at = {bits: sqnr_db(exact, log2_attention_ref(q, k, v, bits)) for bits in (4, 6, 8)}
    assert abs(at[8] - at[4]) < 1.0
    assert 12 < at[4] < 30


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_attention_is_near_the_float_one(shape, generator):
    q, k, v = inputs(shape, generator, 1.0)
    k += torch.randn(1, 1, 1, k.shape[3], generator=generator) * 20  # what smoothing is for
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert sqnr_db(exact, int8_attention_ref(q, k, v)) > 38


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_attention_kernel_matches_the_reference(shape, dtype, generator, triton_device):
    q, k, v = (x.to(dtype) for x in inputs(shape, generator, 1.0))
    y = dispatch.int8_attention(*(x.to(triton_device) for x in (q, k, v)))
    assert y.dtype == dtype
    assert sqnr_db(int8_attention_ref(q.float(), k.float(), v.float()), y.cpu()) > 60  # the map is fp16 there


def test_attention_refuses_shapes_that_do_not_fit(generator):
    q, k, v = inputs((1, 2, 30, 77, 64), generator)
    with pytest.raises(LayoutError, match="attention: q"):
        log2_attention_ref(q, k, v[:, :, :50], 8)
    with pytest.raises(LayoutError, match="start is torch.bool"):
        log2_attention_ref(q, k, v, 8, torch.zeros(1, 50, dtype=torch.bool))


@pytest.mark.parametrize("bits", [3, 9])
def test_attention_scheme_refuses_other_bits(bits):
    with pytest.raises(SchemeError, match=f"{bits} bits"):
        AttentionScheme(AttentionMode.LOG2, bits)
