"""Layers, presets and the recipe's way through JSON."""

import pytest

from stepquant.errors import ModelError, SchemeError
from stepquant.quant.layers import check_is_sdxl, find_layers, has_symmetric_input
from stepquant.quant.real_sensitivity import SDXL_WORST_DB, kept_16_bit
from stepquant.quant.recipe import Recipe, preset_recipe
from stepquant.quant.scheme import FP8, TOKEN16, ActivationMode, Scheme

SHAPES = {
    "input_blocks.0.0.weight": (320, 4, 3, 3),
    "input_blocks.1.0.in_layers.0.weight": (320,),
    "input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
    "input_blocks.1.0.emb_layers.1.weight": (320, 1280),
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": (640, 640),
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    "input_blocks.4.1.transformer_blocks.0.ff.net.2.weight": (640, 2560),
    "time_embed.0.weight": (1280, 320),
    "label_emb.0.0.weight": (1280, 2816),
    "out.2.weight": (4, 320, 3, 3),
}


def test_find_layers_leaves_out_norms_and_the_never_quantized():
    assert set(find_layers(SHAPES)) == {
        "input_blocks.1.0.in_layers.2",
        "input_blocks.1.0.emb_layers.1",
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k",
        "input_blocks.4.1.transformer_blocks.0.ff.net.2",
    }


def test_one_sided_inputs_are_those_after_silu_and_geglu():
    layers = find_layers(SHAPES)
    assert [name.rsplit(".", 2)[-2:] for name in layers if not has_symmetric_input(name)] == [
        ["in_layers", "2"],
        ["emb_layers", "1"],
        ["net", "2"],
    ]


def test_static_preset_keeps_prompt_and_embedding_layers_dynamic():
    schemes = preset_recipe("w8a8-static", find_layers(SHAPES)).schemes
    dynamic = {name for name, scheme in schemes.items() if scheme.activation is ActivationMode.TOKEN}
    assert dynamic == {"input_blocks.1.0.emb_layers.1", "input_blocks.4.1.transformer_blocks.0.attn2.to_k"}


def test_token_preset_needs_no_calibration():
    assert not preset_recipe("w8a8-token", find_layers(SHAPES)).needs_calibration
    assert preset_recipe("w8a8-static", find_layers(SHAPES)).needs_calibration


def test_fp8_preset_takes_fp8_after_geglu_and_int8_elsewhere():
    after_geglu = {*SDXL_WORST_DB, "input_blocks.4.1.transformer_blocks.0.ff.net.2"}
    others = set(find_layers(SHAPES)) - after_geglu
    recipe = preset_recipe("w8a8-fp8", [*after_geglu, *others])
    assert {name for name, scheme in recipe.schemes.items() if scheme == FP8} == after_geglu
    assert {name: recipe.schemes[name] for name in others} == preset_recipe("w8a8-token", others).schemes
    assert not recipe.needs_calibration
    assert Recipe.from_json(recipe.to_json(), "file") == recipe


@pytest.mark.parametrize("change", [{"weight_bits": 4}, {"activation": "static"}, {"symmetric": False}, {"activation": "fp16"}], ids=str)
def test_fp8_scheme_names_the_layer_when_it_asks_for_more_than_dynamic_symmetric_scales(change):
    with pytest.raises(SchemeError, match=r"layer: fp8 .* Update StepQuant"):
        Scheme.from_json(FP8.to_json() | change, "layer")


@pytest.mark.parametrize("change", [{"weight_bits": 4}, {"compute": "fp8"}, {"symmetric": False}, {"compute": "fp16"}], ids=str)
def test_token16_scheme_names_the_layer_when_it_asks_for_more_than_8_bit_weights_in_int8(change):
    assert Scheme.from_json(TOKEN16.to_json(), "layer") == TOKEN16
    assert not TOKEN16.needs_calibration and not TOKEN16.is_static
    with pytest.raises(SchemeError, match=r"layer: .*token16.* Update StepQuant"):
        Scheme.from_json(TOKEN16.to_json() | change, "layer")


def test_recipe_survives_json():
    recipe = preset_recipe("w8a8-static", find_layers(SHAPES), groups=4)
    assert Recipe.from_json(recipe.to_json(), "file") == recipe


def test_preset_names_the_choices_when_unknown():
    with pytest.raises(SchemeError, match="choose one of w8a8-token, w8a8-static"):
        preset_recipe("w2a2", [])


@pytest.mark.parametrize(
    "scheme",
    [{"weight_bits": 3}, {"activation": "magic"}, {"compute": "int2"}, {"rotation": 1}, "w8a8"],
    ids=["bits", "activation", "compute", "new-field", "not-a-table"],
)
def test_recipe_names_the_layer_when_a_scheme_is_unknown(scheme):
    data = preset_recipe("w8a8-token", ["some.layer"]).to_json()
    data["schemes"]["some.layer"] = scheme
    with pytest.raises(SchemeError, match=r"some\.layer: .*Update StepQuant"):
        Recipe.from_json(data, "file")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"double_blocks.0.img_attn.qkv.weight": (1, 1)}, "a transformer model"),
        ({"input_blocks.0.0.weight": (320, 4, 3, 3), "out.2.weight": (4, 320, 3, 3)}, "SD 1.x or 2.x"),
        ({"lm_head.weight": (1, 1)}, "no SDXL UNet found"),
        ({**SHAPES, "input_blocks.1.0.in_layers.2.qweight": (1,)}, "already quantized"),
    ],
    ids=["flux", "sd15", "language-model", "quantized"],
)
def test_check_is_sdxl_says_what_the_model_is_instead(shapes, message):
    with pytest.raises(ModelError, match=rf"model\.safetensors: .*{message}"):
        check_is_sdxl(shapes, "model.safetensors")


def test_check_is_sdxl_accepts_sdxl():
    check_is_sdxl(SHAPES, "model.safetensors")


def test_uncalibrated_preset_keeps_the_worst_layers_of_real_sdxl_16_bit():
    names = [*find_layers(SHAPES), *SDXL_WORST_DB]
    assert set(names) - set(preset_recipe("w8a8-token", names).schemes) == set(SDXL_WORST_DB)
    assert set(preset_recipe("w8a8-static", names).schemes) == set(names)


def test_uncalibrated_preset_keeps_nothing_16_bit_in_a_model_of_another_depth():
    shallow = ["output_blocks.0.1.transformer_blocks.0.ff.net.2", *find_layers(SHAPES)]
    assert not kept_16_bit(shallow)
    assert set(preset_recipe("w8a8-token", iter(shallow)).schemes) == set(shallow)
