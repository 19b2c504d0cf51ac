"""The hard variant: the same function, activations as hard as SDXL's."""

from __future__ import annotations

from statistics import median

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="the demo needs diffusers (stepquant[demo])")
from stepquant.demo.hard_match import (  # noqa: E402
    PROPAGATION_DB,
    SDXL_HARDNESS_DB,
    by_kind,
    first_calls,
    hardness_db,
    layer_hardness,
    layer_inputs,
    match_factors,
)
from stepquant.demo.hard_variant import START_VALUE, harden, read_factors  # noqa: E402
from stepquant.demo.pipeline import load_demo_pipeline  # noqa: E402
from stepquant.hosts.diffusers.scale_moves import READERS, transformer_blocks  # noqa: E402
from stepquant.hosts.diffusers.trajectory import UNetCall  # noqa: E402

TINY = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "transformer_layers_per_block": (0, 1),
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 48,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**TINY).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def call(unet):
    generator = torch.Generator().manual_seed(1)
    arguments = {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(999),
        "encoder_hidden_states": torch.randn(2, 154, 48, generator=generator),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 16, generator=generator), "time_ids": torch.ones(2, 6)},
    }
    with torch.inference_mode():
        return UNetCall(0, arguments, unet(**arguments).sample)


@pytest.fixture(scope="module")
def factors(unet):
    return {f"{path}.{site}": {3: 20.0} for path in transformer_blocks(unet) for site in READERS}


@pytest.fixture(scope="module")
def hard(unet, factors):
    return harden(unet, factors)


def test_hard_variant_computes_the_same_function(unet, hard, call):
    with torch.inference_mode():
        y = hard(**call.arguments).sample
    assert float((y - call.output).norm() / call.output.norm()) < 1e-4


def test_hard_variant_grows_the_chosen_channel_of_every_site_and_no_other(unet, hard, call):
    before, after = layer_inputs(unet, [call]), layer_inputs(hard, [call])
    assert len(before) == 48
    for name, x in before.items():
        ratio = after[name].abs().amax(0) / x.abs().amax(0)
        expected = torch.ones_like(ratio)
        expected[3] = 20.0
        torch.testing.assert_close(ratio, expected, rtol=2e-3, atol=0)


def test_hard_variant_leaves_the_original_as_it_was(unet, hard, call):
    with torch.inference_mode():
        torch.testing.assert_close(unet(**call.arguments).sample, call.output, rtol=0, atol=0)


def test_hard_variant_marks_the_start_of_every_chunk_in_one_extra_channel(hard, call):
    seen = []
    layer = hard.get_submodule(next(name for name, _ in hard.named_modules() if name.endswith("attn2.to_k")))
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.inference_mode():
        hard(**call.arguments)
    handle.remove()
    extra = seen[0][..., 48:]
    assert extra[0, :, 0].nonzero().flatten().tolist() == [0, 77]
    assert extra.max() == START_VALUE and not extra[..., 1:].any()


def test_hardness_of_white_noise_grows_with_an_outlier():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(512, 64, generator=generator), torch.randn(32, 64, generator=generator)
    plain = hardness_db(x, weight)
    x[:, 5] *= 10
    weight[:, 5] /= 10
    # A range ten times as wide is 20 dB at most: the weights' noise in that channel grows too.
    assert 10 < hardness_db(x, weight) - plain < 20


def test_match_factors_hardens_where_sdxl_is_harder_and_is_the_same_every_time(unet, call):
    first = match_factors(unet, [call])
    assert first == match_factors(unet, [call])
    assert first and all(factor > 1 for channels in first.values() for factor in channels.values())


def test_shipped_factors_match_sdxl_in_every_kind_of_layer():
    pipeline = load_demo_pipeline()
    calls = first_calls(pipeline)
    assert len(calls) == 1
    hard = harden(pipeline.unet, read_factors())
    inputs = layer_inputs(hard, calls)
    found = {kind: median(values) + PROPAGATION_DB[kind] for kind, values in by_kind(layer_hardness(hard, inputs)).items()}
    for kind, quantiles in SDXL_HARDNESS_DB.items():
        # Moves only harden: what is harder than SDXL's already stays so.
        assert abs(found[kind] - quantiles[2]) < 3, kind
    with torch.inference_mode():
        y = hard(**calls[0].arguments).sample
    assert float((y - calls[0].output).norm() / calls[0].output.norm()) < 1e-5
