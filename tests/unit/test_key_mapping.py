"""The UNet key mapping is a bijection on SDXL's topology, and refuses names of other models."""

import pytest

from stepquant.hosts.key_mapping import UnknownUNetKey, diffusers_to_ldm, ldm_to_diffusers

# Facts of the published SDXL checkpoint and of diffusers' SDXL UNet, one for each kind of block.
PAIRS = [
    ("input_blocks.0.0.weight", "conv_in.weight"),
    ("time_embed.2.bias", "time_embedding.linear_2.bias"),
    ("label_emb.0.0.weight", "add_embedding.linear_1.weight"),
    ("input_blocks.1.0.in_layers.2.weight", "down_blocks.0.resnets.0.conv1.weight"),
    ("input_blocks.3.0.op.weight", "down_blocks.0.downsamplers.0.conv.weight"),
    ("input_blocks.4.0.skip_connection.weight", "down_blocks.1.resnets.0.conv_shortcut.weight"),
    ("input_blocks.6.0.op.bias", "down_blocks.1.downsamplers.0.conv.bias"),
    (
        "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight",
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj.weight",
    ),
    ("middle_block.1.proj_in.weight", "mid_block.attentions.0.proj_in.weight"),
    ("middle_block.2.emb_layers.1.weight", "mid_block.resnets.1.time_emb_proj.weight"),
    ("output_blocks.2.2.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
    ("output_blocks.5.1.norm.weight", "up_blocks.1.attentions.2.norm.weight"),
    ("output_blocks.5.2.conv.bias", "up_blocks.1.upsamplers.0.conv.bias"),
    ("output_blocks.8.0.out_layers.3.weight", "up_blocks.2.resnets.2.conv2.weight"),
    ("out.0.weight", "conv_norm_out.weight"),
    ("out.2.bias", "conv_out.bias"),
]


@pytest.mark.parametrize(("ldm", "diffusers"), PAIRS, ids=[pair[0] for pair in PAIRS])
def test_key_mapping_agrees_with_published_names(ldm, diffusers):
    assert ldm_to_diffusers(ldm) == diffusers
    assert diffusers_to_ldm(diffusers) == ldm


def test_key_mapping_takes_module_names_without_parameter():
    assert ldm_to_diffusers("input_blocks.4.1.transformer_blocks.0.attn2.to_k") == (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    )
    assert ldm_to_diffusers("output_blocks.2.2.conv") == "up_blocks.0.upsamplers.0.conv"
    assert diffusers_to_ldm("down_blocks.0.resnets.1") == "input_blocks.2.0"


@pytest.mark.parametrize("depths", [(0, 1, 2), (0, 2, 10)], ids=["demo", "sdxl"])
def test_key_mapping_covers_every_parameter_of_a_unet_both_ways(depths):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64, 64),
            transformer_layers_per_block=depths,
            attention_head_dim=(1, 2, 2),
            cross_attention_dim=32,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
        )
    names = list(unet.state_dict())
    ldm_names = [diffusers_to_ldm(name) for name in names]
    assert len(set(ldm_names)) == len(names)
    assert [ldm_to_diffusers(name) for name in ldm_names] == names


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "input_blocks.9.0.in_layers.0.weight",
        "double_blocks.0.img_attn.qkv.weight",
        "input_blocks.1.0.nonsense.weight",
    ],
    ids=["prefix", "sd15_depth", "flux", "child"],
)
def test_key_mapping_names_the_key_when_it_is_not_of_this_topology(key):
    with pytest.raises(UnknownUNetKey, match=r"needed"):
        ldm_to_diffusers(key)


@pytest.mark.parametrize("key", ["down_blocks.3.resnets.0.conv1.weight", "up_blocks.2.upsamplers.0.conv.weight"])
def test_key_mapping_refuses_diffusers_names_of_another_topology(key):
    with pytest.raises(UnknownUNetKey, match=r"needed"):
        diffusers_to_ldm(key)
