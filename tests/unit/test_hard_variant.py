"""The hard variant: the same function, harder activations."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="the demo needs diffusers (stepquant[demo])")
from stepquant.demo.hard_variant import (  # noqa: E402
    SDXL_GAP_DB,
    SITES,
    START_VALUE,
    activation_sqnr_db,
    channel_absmax,
    gaps_db,
    harden,
    matched_growth,
    outlier_factors,
    site_layers,
    weight_sqnr_db,
)
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
def hard(unet, call):
    return harden(unet, dict.fromkeys(SITES, 20.0), channel_absmax(unet, [call]))


def test_hard_variant_computes_the_same_function(unet, hard, call):
    with torch.inference_mode():
        y = hard(**call.arguments).sample
    assert float((y - call.output).norm() / call.output.norm()) < 1e-4


@pytest.mark.parametrize("kind", ["attn1.to_q", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"])
def test_hard_variant_has_a_range_twenty_times_as_wide_in_every_kind_of_layer(unet, hard, call, kind):
    before, after = channel_absmax(unet, [call]), channel_absmax(hard, [call])
    names = site_layers(unet)[kind]
    assert len(names) == 6
    for name in names:
        assert float(after[name].max() / before[name].max()) == pytest.approx(20, rel=1e-3)
        assert float(after[name].median()) == pytest.approx(float(before[name].median()), rel=1e-3)


def test_hard_variant_costs_more_than_its_weights_do_in_every_kind_of_layer(unet, hard, call):
    before, after = (gaps_db(one, activation_sqnr_db(one, [call]), weight_sqnr_db(one, [call])) for one in (unet, hard))
    for kind in SDXL_GAP_DB:
        # 20 log10(20) = 26 dB at most: where a step is wider than most values, these become 0 and the noise grows no more.
        assert 4 < after[kind] - before[kind] < 27, kind


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


def test_outlier_factors_leave_all_but_a_hundredth_of_the_channels_alone():
    factor = outlier_factors(torch.linspace(1, 2, 200), 10.0)
    assert (factor != 1).sum() == 2
    assert float((torch.linspace(1, 2, 200) * factor).max()) == pytest.approx(20.0)
    assert torch.equal(outlier_factors(torch.rand(200), 0.5), torch.ones(200))


def test_matched_growth_closes_the_gap_and_never_softens():
    gaps = dict(SDXL_GAP_DB) | {"ff.net.2": SDXL_GAP_DB["ff.net.2"] - 20, "attn2.to_q": 30.0}
    growth = matched_growth(gaps)
    assert growth["value"] == pytest.approx(10.0)
    assert growth["attn2"] == pytest.approx(1.0) and growth["norm2"] == 1.0
