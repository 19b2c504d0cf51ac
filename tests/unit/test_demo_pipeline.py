"""The shipped demo model opens without a network, draws the same picture twice, and puts it on the asked background."""

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: the demo model's pipeline is not tested here")

from safetensors.torch import load_file

from stepquant.demo.checkpoint import write_checkpoint
from stepquant.demo.ldm_state import (
    TOKEN_TABLES,
    USED_TOKEN_IDS,
    expand_token_tables,
    text_from_ldm,
    text_to_ldm,
    unet_from_ldm,
    unet_to_ldm,
    vae_from_ldm,
    vae_to_ldm,
)
from stepquant.demo.pipeline import load_demo_pipeline, read_demo_state
from stepquant.demo.recipe.scenes import BACKGROUNDS
from stepquant.demo.tokenizer import VOCAB_SIZE, build_vocabulary


@pytest.fixture(scope="module")
def pipeline():
    loaded = load_demo_pipeline()
    loaded.set_progress_bar_config(disable=True)
    return loaded


def _draw(pipeline, prompt, steps, seed=3):
    generator = torch.Generator().manual_seed(seed)
    out = pipeline(prompt, negative_prompt="", num_inference_steps=steps, generator=generator, output_type="pt")
    return out.images[0]  # (3, 256, 256) in [0, 1]


def test_demo_pipeline_draws_the_same_picture_for_the_same_seed(pipeline):
    first, second = (_draw(pipeline, "3d render of a red apple, blue background", steps=2) for _ in range(2))
    assert first.shape == (3, 256, 256)
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)


@pytest.mark.parametrize("word", ["black", "green"])
def test_demo_pipeline_paints_the_asked_background(pipeline, word):
    picture = _draw(pipeline, f"3d render of a red apple, {word} background", steps=6) * 255
    border = torch.cat([picture[:, :8].flatten(1), picture[:, -8:].flatten(1)], dim=1).median(1).values
    distances = {name: (border - torch.tensor(colour)).abs().sum().item() for name, colour in BACKGROUNDS.items()}
    assert min(distances, key=distances.get) == word


def test_demo_tokenizer_pads_as_the_two_encoders_expect(pipeline):
    ids_l, ids_g = (
        tokenizer("a cat", padding="max_length", max_length=8).input_ids for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    )
    # "a" = 320 and "cat" = 2368 in OpenAI's CLIP vocabulary.
    assert ids_l == [49406, 320, 2368, 49407, 49407, 49407, 49407, 49407]
    assert ids_g == [49406, 320, 2368, 49407, 0, 0, 0, 0]
    assert len(build_vocabulary()) == VOCAB_SIZE


def test_demo_state_survives_the_way_to_diffusers_and_back():
    state = read_demo_state()
    unet = unet_to_ldm(unet_from_ldm(state))
    vae = vae_to_ldm(vae_from_ldm(state))
    text = text_to_ldm(*text_from_ldm(state), state[USED_TOKEN_IDS])
    rebuilt = {**unet, **vae, **text}
    assert rebuilt.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(rebuilt[key].to(value.dtype), value), key


def test_demo_token_tables_keep_used_rows_and_fill_others_with_their_mean():
    state = read_demo_state()
    whole = expand_token_tables(state, VOCAB_SIZE)
    used = state[USED_TOKEN_IDS].long()
    unused = next(index for index in range(VOCAB_SIZE) if index not in set(used.tolist()))
    for key in TOKEN_TABLES:
        assert whole[key].shape[0] == VOCAB_SIZE
        assert torch.equal(whole[key][used], state[key])
        assert torch.equal(whole[key][unused], state[key].float().mean(0).to(state[key].dtype))
    assert USED_TOKEN_IDS not in whole


def test_demo_checkpoint_holds_every_component_under_sdxl_names(tmp_path):
    state = load_file(write_checkpoint(tmp_path / "folder" / "demo.safetensors"))
    assert state["model.diffusion_model.input_blocks.0.0.weight"].shape == (64, 4, 3, 3)
    assert state["conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"].shape == (49408, 128)
    assert state["conditioner.embedders.1.model.token_embedding.weight"].shape == (49408, 192)
    assert state["first_stage_model.vae_scale"].item() == pytest.approx(0.13025)
