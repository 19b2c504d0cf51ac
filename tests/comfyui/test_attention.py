"""Attention schemes through ComfyUI's own attention function: the right layer, start tokens, and other overrides in the chain."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfy.ldm.modules import attention
from comfy.ldm.modules.attention import optimized_attention
from torch.nn.functional import scaled_dot_product_attention

from stepquant.hosts.attention import attend
from stepquant.hosts.comfy.attention import OVERRIDE, AttentionOverride, layer_name, set_attention
from stepquant.hosts.comfy.blocks import attention as block_attention
from stepquant.kernels import dispatch
from stepquant.kernels.attention import attention_ref
from stepquant.quant.log2_attention import AttentionMode, AttentionScheme
from stepquant.quant.sqnr import sqnr_db

CROSS, SELF = "input_blocks.4.1.transformer_blocks.1.attn2", "input_blocks.4.1.transformer_blocks.1.attn1"
LOG2, INT8 = AttentionScheme(AttentionMode.LOG2, 8), AttentionScheme(AttentionMode.INT8_QK)
HERE = {"block": ("input", 4), "block_index": 1}
HEADS = 2


def inputs(tokens: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, HEADS * 32, generator=generator) for length in (64, tokens, tokens))
    if tokens == 77:
        k[:, 0] *= 40
    return q, k, v


def split(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def exact(q, k, v) -> torch.Tensor:
    return scaled_dot_product_attention(*map(split, (q, k, v))).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("layer", "tokens"), [(CROSS, 77), (SELF, 64)])
def test_override_gives_the_named_layer_its_scheme_and_leaves_the_others(layer, tokens):
    options = HERE | {OVERRIDE: AttentionOverride({layer: LOG2})}
    here = optimized_attention(*inputs(tokens), HEADS, transformer_options=options)
    q, k, v = inputs(tokens)
    expected = attend(split(q), split(k), split(v), LOG2, k if tokens == 77 else None).transpose(1, 2).flatten(2)
    assert torch.equal(here, expected)
    elsewhere = optimized_attention(*inputs(tokens), HEADS, transformer_options=options | {"block_index": 0})
    assert sqnr_db(exact(*inputs(tokens)), elsewhere) > 100


def test_fused_blocks_use_a_faster_kernel_unless_somebody_overrides_attention(monkeypatch):
    """Where ComfyUI would call PyTorch's attention; another pack's is still called. Without a GPU there is no kernel: its formula."""
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    monkeypatch.setattr(dispatch, "has_attention", lambda *operands: True)
    q, k, v = inputs(77)
    used = []
    monkeypatch.setattr(dispatch, "attention", lambda *operands: used.append(operands) or attention_ref(*operands))
    found = block_attention.attend(q, k, v, HEADS, None, {}, False)
    assert len(used) == 1
    assert sqnr_db(exact(q, k, v), found) > 100
    overridden = block_attention.attend(q, k, v, HEADS, None, {OVERRIDE: lambda function, *rest, **named: q + 1}, False)
    assert torch.equal(overridden, q + 1) and len(used) == 1


def test_override_in_the_fast_mode_is_near_the_float_one():
    options = HERE | {OVERRIDE: AttentionOverride({SELF: INT8})}
    assert sqnr_db(exact(*inputs(64)), optimized_attention(*inputs(64), HEADS, transformer_options=options)) > 38


def test_override_passes_masks_and_other_layers_to_the_override_before_it():
    seen = []

    def before(function, *args, **kwargs):
        seen.append(args[0].shape)
        return function(*args, **kwargs)

    options = HERE | {OVERRIDE: AttentionOverride({CROSS: LOG2}, before)}
    optimized_attention(*inputs(77), HEADS, transformer_options=options)
    assert not seen
    masked = optimized_attention(*inputs(77), HEADS, mask=torch.zeros(2, 64, 77), transformer_options=options)
    other = optimized_attention(*inputs(64), HEADS, transformer_options=options)
    assert len(seen) == 2
    assert sqnr_db(exact(*inputs(77)), masked) > 100 and sqnr_db(exact(*inputs(64)), other) > 100


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"block": ("middle", 0), "block_index": 3}, "middle_block.1.transformer_blocks.3.attn2"),
        ({"block": ("output", 5), "block_index": 0}, "output_blocks.5.1.transformer_blocks.0.attn2"),
        ({"block": ("controlnet", 5), "block_index": 0}, None),
        ({}, None),
    ],
    ids=["middle", "output", "elsewhere", "outside"],
)
def test_layer_name_is_the_files_own(options, name):
    assert layer_name(options, torch.empty(1, 64, 8), torch.empty(1, 77, 8)) == name


def test_set_attention_replaces_its_own_override_and_keeps_a_foreign_one():
    foreign = object()
    patcher = SimpleNamespace(model_options={"transformer_options": {OVERRIDE: foreign}})
    set_attention(patcher, {CROSS: LOG2})
    set_attention(patcher, {SELF: INT8})
    installed = patcher.model_options["transformer_options"][OVERRIDE]
    assert installed.schemes == {SELF: INT8} and installed.previous is foreign
    set_attention(patcher, {})
    assert patcher.model_options["transformer_options"][OVERRIDE] is foreign
