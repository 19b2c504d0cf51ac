"""QuEST: tuned layers start from what they are given, a run resumes anywhere and touches nothing else, and says what it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stepquant.errors import CalibrationError, SchemeError
from stepquant.quant.int4 import quantize_int4, unpacked
from stepquant.quant.layers import find_layers
from stepquant.quant.recipe import preset_recipe
from stepquant.quant.rounding.method import Rounding, RoundingMethod
from stepquant.quant.rounding.tuned import TunedLinear
from stepquant.quant.tuning.training import TuningSettings, train

PROMPTS = ("3d render of a teddy bear", "flat icon of a cactus, pink background")
INSIDE = "middle_block.1.transformer_blocks"


def _linear(N=32, K=128):
    linear = torch.nn.Linear(K, N).requires_grad_(False)
    linear.weight.copy_(torch.randn(N, K, generator=torch.Generator().manual_seed(0)))
    return linear


@pytest.mark.parametrize("rank", [0, 4])
def test_a_layer_in_training_starts_as_the_codes_it_was_given(rank):
    linear = _linear()
    start = Rounding().round(linear.weight, "layer", rank)
    tuned, x = TunedLinear(linear, start), torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(tuned(x), x @ start.dequantize().t() + linear.bias, atol=1e-4)
    assert torch.equal(tuned.result().codes, start.codes) and torch.equal(tuned.result().scale, start.scale)


def test_training_moves_codes_and_scales_towards_the_float_layers_output():
    linear = _linear()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(400, 16, generator=generator) @ torch.randn(16, 128, generator=generator)
    start, wanted = quantize_int4(linear.weight, "layer"), linear(x)
    tuned = TunedLinear(linear, start)
    parameters = dict(tuned.named_parameters())
    train(parameters, lambda step, _: (tuned(x) - wanted).square().mean(), TuningSettings(steps=60, learning_rate=1e-2))
    found = tuned.result()
    errors = [float((x @ weight.dequantize().t() + linear.bias - wanted).square().mean()) for weight in (start, found)]
    assert errors[1] < 0.3 * errors[0]
    assert not torch.equal(found.codes, start.codes) and not torch.equal(found.scale, start.scale)
    assert int(found.codes.min()) >= -8 and int(found.codes.max()) <= 7 and bool((found.scale > 0).all())


def test_inputs_are_rounded_in_training_as_the_kernels_do_if_asked():
    linear = _linear()
    start, x = quantize_int4(linear.weight, "layer"), torch.randn(5, 128, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = TunedLinear(linear, start, levels=127)(x)
    scale = x.detach().abs().amax(1, keepdim=True) / 127
    assert torch.allclose(y, ((x / scale).round() * scale) @ start.dequantize().t() + linear.bias, atol=1e-4)
    y.sum().backward()
    assert torch.allclose(x.grad, start.dequantize().sum(0).expand(5, -1), atol=1e-4)


def test_packed_codes_come_back():
    weight = quantize_int4(torch.randn(8, 192, generator=torch.Generator().manual_seed(0)), "layer")
    assert torch.equal(unpacked(weight.packed(), 3), weight.codes)


@pytest.fixture(scope="module")
def pipeline():
    pytest.importorskip("diffusers", reason="the embedded engine needs diffusers (stepquant[demo])")
    from stepquant.demo.pipeline import load_demo_pipeline

    return load_demo_pipeline()


def _recipe(unet, preset="w4a8-mixed"):
    """4 bits in the middle block's transformer blocks alone."""
    from stepquant.hosts.diffusers.quantize import unet_shapes

    recipe = preset_recipe(preset, find_layers(unet_shapes(unet)))
    eight = {name: preset_recipe("w8a8-token", [name]).schemes[name] for name in recipe.schemes if INSIDE not in name}
    return replace(recipe, schemes={**recipe.schemes, **eight})


def _quick(steps=3, **changes):
    from stepquant.hosts.diffusers.quest import Quest
    from stepquant.hosts.diffusers.trajectory import Sampling

    # So little memory that every feed-forward is a part.
    return replace(Quest(Sampling(steps=2), calls=2, training=TuningSettings(steps=steps, learning_rate=1e-2), memory_bytes=1), **changes)


def _codes(files, unet, names):
    from stepquant.hosts.key_mapping import ldm_to_diffusers

    return {name: files.find(name, tuple(unet.get_submodule(ldm_to_diffusers(name)).weight.shape)) for name in names}


def test_quest_resumes_inside_a_part_and_leaves_the_model_as_it_was(pipeline, tmp_path):
    from stepquant.hosts.diffusers.quest import quest

    recipe = _recipe(pipeline.unet)
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}

    def cancel_in_the_second_part(done, total):
        assert total == 3 * 2
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quest(pipeline, recipe, PROMPTS, tmp_path / "resumed", _quick(), progress=cancel_in_the_second_part)
    first, second = (f"{INSIDE}.{block}.ff.net.0.proj" for block in (0, 1))
    assert {file.name for file in (tmp_path / "resumed").iterdir()} == {"start.safetensors", f"{first}.safetensors", f"{second}.state"}
    seen = []
    resumed = quest(pipeline, recipe, PROMPTS, tmp_path / "resumed", _quick(), progress=lambda done, total: seen.append(done))
    assert seen == [6]
    whole = quest(pipeline, recipe, PROMPTS, tmp_path / "whole", _quick())
    names = [name for name, scheme in recipe.schemes.items() if scheme.is_int4]
    one, other = (_codes(files, pipeline.unet, names) for files in (resumed, whole))
    assert all(torch.equal(one[name].codes, other[name].codes) and torch.equal(one[name].scale, other[name].scale) for name in names)
    assert not list((tmp_path / "resumed").glob("*.state"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.unet.state_dict().items())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in pipeline.unet.modules())
    with pytest.raises(CalibrationError, match="rounded with other settings"):
        quest(pipeline, recipe, PROMPTS[:1], tmp_path / "whole", _quick())


@pytest.mark.parametrize(("exact", "steps"), [(False, 10), (True, 5)], ids=["floats", "codes and checkpoints"])
def test_quest_brings_the_unets_answers_nearer_and_its_folder_is_all_that_quantize_needs(exact, steps, pipeline, tmp_path):
    from stepquant.hosts.diffusers.fidelity import step_sqnr
    from stepquant.hosts.diffusers.quantize import quantize_unet, state_of
    from stepquant.hosts.diffusers.quest import quest
    from stepquant.hosts.diffusers.reconstruct import sharing_copy
    from stepquant.hosts.diffusers.trajectory import Sampling, record_trajectory

    recipe = _recipe(pipeline.unet)
    how = _quick(steps, memory_bytes=1 << 30, exact=exact)
    files = quest(pipeline, recipe, PROMPTS, tmp_path, how)
    reference = record_trajectory(pipeline, PROMPTS, Sampling(2, seed=0), 2)
    found = []
    for rounding in (Rounding(), Rounding(RoundingMethod.QUEST, rounded=files.find)):
        unet = quantize_unet(sharing_copy(pipeline.unet), recipe, rounding=rounding)
        state_of(unet).tap.follow(pipeline.scheduler)
        found.append(step_sqnr(unet, reference).mean_db())
    assert found[1] > found[0] + 0.03
    plain = Rounding().round(pipeline.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q").weight, "layer")
    untouched = f"{INSIDE}.0.attn1.to_q"
    assert torch.equal(_codes(files, pipeline.unet, [untouched])[untouched].codes, plain.codes)


def test_quest_takes_time_layers_first_and_parts_that_fit_the_memory(pipeline):
    from stepquant.hosts.diffusers.quantize import unet_shapes
    from stepquant.hosts.diffusers.quest import quest_parts

    recipe = preset_recipe("w4a8-token", find_layers(unet_shapes(pipeline.unet)))
    parts = quest_parts(pipeline.unet, recipe, 20 << 20)
    kinds = ["time" if "emb_layers" in part else "ff" for part in parts]
    assert kinds == sorted(kinds, reverse=True) and kinds.count("ff") > 2 and kinds[0] == "time"
    assert all(("emb_layers" in name) == ("emb_layers" in part) for part, names in parts.items() for name in names)
    with pytest.raises(SchemeError, match="no feed-forward or time layers with 4 bits"):
        quest_parts(pipeline.unet, preset_recipe("w8a8-token", recipe.schemes), 1)


def test_quest_of_full_size_sdxl_fits_an_8_gb_gpu_and_24_gb_of_ram():
    pytest.importorskip("diffusers", reason="the embedded engine needs diffusers (stepquant[demo])")
    from diffusers import UNet2DConditionModel

    from stepquant.hosts.diffusers.quantize import unet_shapes
    from stepquant.hosts.diffusers.quest import Quest, quest_parts
    from stepquant.hosts.diffusers.quest_cost import quest_cost
    from stepquant.hosts.diffusers.sdxl_config import UNET
    from stepquant.quant.layer_noise import stored_bytes
    from stepquant.quant.plan import unquantized_bytes

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNET).half()
    shapes = unet_shapes(unet)
    layers = find_layers(shapes)
    recipe, how = preset_recipe("w4a8-mixed", layers), Quest(exact=True)
    cost = quest_cost(unet, recipe, layers, quest_parts(unet, recipe, how.memory_bytes), 24, how)
    quantized = unquantized_bytes(shapes, layers) + sum(stored_bytes(spec, recipe.schemes.get(name)) for name, spec in layers.items())
    assert 2 << 30 < quantized + cost.memory_bytes < 8e9
    assert 5e9 < cost.ram_bytes < 24e9
    assert cost.parts > 10 and cost.values > 1e9
    less = replace(how, memory_bytes=how.memory_bytes // 2)
    assert quest_cost(unet, recipe, layers, quest_parts(unet, recipe, less.memory_bytes), 24, less).memory_bytes < cost.memory_bytes


def test_quest_refuses_no_prompts(pipeline, tmp_path):
    from stepquant.hosts.diffusers.quest import quest

    with pytest.raises(CalibrationError, match="no prompts"):
        quest(pipeline, _recipe(pipeline.unet), [], tmp_path)
