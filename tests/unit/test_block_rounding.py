"""Rounding learned on whole blocks: it beats GPTQ, keeps the start that is better, resumes, and puts nothing into the float model."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepquant.errors import CalibrationError, FormatError, SchemeError, WeightError
from stepquant.quant.int4 import quantize_int4
from stepquant.quant.layers import find_layers
from stepquant.quant.recipe import preset_recipe
from stepquant.quant.rounding.block import RoundedLinear, Training, learn_rounding
from stepquant.quant.rounding.folder import ROUNDED_KEY, RoundedFolder
from stepquant.quant.rounding.gptq import gptq_int4
from stepquant.quant.rounding.method import Rounding, RoundingMethod

LAYER = "middle_block.1.transformer_blocks.0.attn1.to_q"


def _block():
    """Two Linears with a nonlinearity between them: what the second can make up for, no layer's own Hessian knows."""
    generator = torch.Generator().manual_seed(3)
    block = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 32)).requires_grad_(False)
    for linear in (block[0], block[2]):
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) / 8)
    mixed = torch.randn(600, 16, generator=generator) @ torch.randn(16, 64, generator=generator)
    return block, mixed + 0.3 * torch.randn(600, 64, generator=generator)


def _trained(block, x, starts, training):
    soft = copy.deepcopy(block)
    layers = {name: RoundedLinear(soft[int(name)], start) for name, start in starts.items()}
    for name, layer in layers.items():
        soft[int(name)] = layer
    return learn_rounding(layers, lambda rows: soft(x[rows]), block(x), training, "block")


def _error(block, x, weights):
    rounded = copy.deepcopy(block)
    for name, weight in weights.items():
        rounded[int(name)].weight.copy_(weight.dequantize())
    return float((rounded(x) - block(x)).square().mean())


def test_learned_rounding_beats_plain_rounding_also_on_samples_that_it_has_not_seen():
    block, x = _block()
    starts = {name: quantize_int4(block[int(name)].weight, name) for name in ("0", "2")}
    learned = _trained(block, x[:400], starts, Training(iterations=150, batch_size=64))
    assert _error(block, x[:400], learned) < 0.4 * _error(block, x[:400], starts)
    assert _error(block, x[400:], learned) < 0.5 * _error(block, x[400:], starts)


def test_learned_rounding_keeps_a_branch_beside_the_codes_and_learns_them_with_it():
    block, x = _block()
    starts = {name: Rounding().round(block[int(name)].weight, name, 4) for name in ("0", "2")}
    learned = _trained(block, x[:400], starts, Training(iterations=100, batch_size=64))
    assert _error(block, x[400:], learned) < 0.7 * _error(block, x[400:], starts)
    assert all(learned[name].branch is start.branch for name, start in starts.items())


def test_learned_rounding_is_the_start_when_nothing_is_better():
    # The weights lie on the start's codes exactly.
    block, x = _block()
    starts = {name: quantize_int4(block[int(name)].weight, name) for name in ("0", "2")}
    for name, start in starts.items():
        block[int(name)].weight.copy_(start.dequantize())
    learned = _trained(block, x, starts, Training(iterations=5, batch_size=64))
    for name, start in starts.items():
        assert torch.equal(learned[name].codes, start.codes)
        assert torch.equal(learned[name].group_scale, start.group_scale)


def test_learned_rounding_is_the_same_again_with_the_same_seed():
    block, x = _block()
    starts = {"0": quantize_int4(block[0].weight, "0")}
    first, second, other = (_trained(block, x, starts, Training(20, 32, seed))["0"].codes for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_learning_names_the_block_when_its_output_is_not_finite():
    block, x = _block()
    x[:] = torch.inf
    with pytest.raises(WeightError, match="block: its output is not finite"):
        _trained(block, x, {"0": quantize_int4(block[0].weight, "0")}, Training(2, 4))


def _weight():
    return torch.randn(48, 128, generator=torch.Generator().manual_seed(4))


def test_rounding_takes_learned_codes_and_falls_back_to_plain_or_gptq(tmp_path):
    weight, hessian = _weight(), torch.eye(128) + 0.5
    learned = gptq_int4(weight, hessian, LAYER)
    files = RoundedFolder(tmp_path)
    files.write("middle_block.1.transformer_blocks.0", {LAYER: learned})
    plain = Rounding(RoundingMethod.RECONSTRUCT, rounded=RoundedFolder(tmp_path).find)
    assert torch.equal(plain.round(weight, LAYER).codes, learned.codes)
    other = LAYER.replace("to_q", "to_k")
    assert torch.equal(plain.round(weight, other).codes, quantize_int4(weight, other).codes)
    gptq = Rounding(RoundingMethod.RECONSTRUCT, lambda name: hessian, RoundedFolder(tmp_path).find)
    assert torch.equal(gptq.round(weight, other).codes, learned.codes)
    with pytest.raises(CalibrationError, match="rounding reconstruct: nothing was learned"):
        Rounding(RoundingMethod.RECONSTRUCT)


@pytest.mark.parametrize(("part", "value"), [("codes", 9), ("group_scale", 0), ("scale", float("nan"))])
def test_rounded_folder_refuses_damaged_files(part, value, tmp_path):
    RoundedFolder(tmp_path).write("block", {LAYER: quantize_int4(_weight(), LAYER)})
    file = tmp_path / "block.safetensors"
    tensors = load_file(file)
    tensors[f"{LAYER}.{part}"].view(-1)[3] = value
    save_file(tensors, file, {ROUNDED_KEY: json.dumps({"version": 1, "summary": {}})})
    with pytest.raises(FormatError, match=f"{LAYER}: damaged"):
        RoundedFolder(tmp_path).find(LAYER, (48, 128))


def test_rounded_folder_refuses_another_model_and_an_empty_folder(tmp_path):
    with pytest.raises(CalibrationError, match="holds no rounded weights"):
        RoundedFolder(tmp_path).find(LAYER, (48, 128))
    RoundedFolder(tmp_path).write("block", {LAYER: quantize_int4(_weight(), LAYER)})
    with pytest.raises(FormatError, match="of another model"):
        RoundedFolder(tmp_path).find(LAYER, (48, 192))
    assert RoundedFolder(tmp_path).find("another.layer", (48, 128)) is None


@pytest.fixture(scope="module")
def pipeline():
    pytest.importorskip("diffusers", reason="the embedded engine needs diffusers (stepquant[demo])")
    from stepquant.demo.pipeline import load_demo_pipeline

    return load_demo_pipeline()


def _recipe(unet, preset="w4a8-mixed", inside="middle_block.1.transformer_blocks"):
    from stepquant.hosts.diffusers.quantize import unet_shapes

    recipe = preset_recipe(preset, find_layers(unet_shapes(unet)))
    recipe.schemes.update({name: preset_recipe("w8a8-token", [name]).schemes[name] for name in recipe.schemes if inside not in name})
    return recipe


def _quick(iterations=3):
    from stepquant.hosts.diffusers.reconstruct import Reconstruction
    from stepquant.hosts.diffusers.trajectory import Sampling

    return Reconstruction(Sampling(steps=2), calls=1, training=Training(iterations, 2))


PROMPTS = ("3d render of a teddy bear", "flat icon of a cactus, pink background")


def test_reconstruct_resumes_after_a_cancel_and_leaves_the_model_as_it_was(pipeline, tmp_path):
    from stepquant.hosts.diffusers.reconstruct import reconstruct

    recipe = _recipe(pipeline.unet)
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}

    def cancel_in_the_second_block(done, total):
        assert total == 6
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct(pipeline, recipe, PROMPTS, tmp_path / "resumed", _quick(), progress=cancel_in_the_second_block)
    assert [file.name for file in (tmp_path / "resumed").iterdir()] == ["middle_block.1.transformer_blocks.0.safetensors"]
    seen = []
    resumed = reconstruct(pipeline, recipe, PROMPTS, tmp_path / "resumed", _quick(), progress=lambda done, total: seen.append(done))
    assert seen == [4, 5, 6]
    whole = reconstruct(pipeline, recipe, PROMPTS, tmp_path / "whole", _quick())
    for name, scheme in recipe.schemes.items():
        if scheme.is_int4 and "attn2.to_k" not in name and "attn2.to_v" not in name:
            shape = tuple(pipeline.unet.state_dict()[_weight_key(name)].shape)
            # The same but for the last bits of inputs that came another way.
            assert float((resumed.find(name, shape).codes == whole.find(name, shape).codes).float().mean()) > 0.999, name
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.unet.state_dict().items())
    assert not any(module._forward_pre_hooks for module in pipeline.unet.modules())
    with pytest.raises(CalibrationError, match="rounded with other settings"):
        reconstruct(pipeline, recipe, PROMPTS[:1], tmp_path / "whole", _quick())


def _weight_key(name):
    from stepquant.hosts.key_mapping import ldm_to_diffusers

    return f"{ldm_to_diffusers(name)}.weight"


def test_reconstruct_follows_the_order_in_which_the_unet_runs(pipeline):
    from stepquant.hosts.diffusers.quantize import unet_shapes
    from stepquant.hosts.diffusers.reconstruct import reconstructed_layers

    recipe = preset_recipe("w4a8-mixed", find_layers(unet_shapes(pipeline.unet)))
    blocks = reconstructed_layers(pipeline.unet, recipe)
    kinds = [path.partition("_")[0] for path in blocks]
    assert kinds == sorted(kinds, key=("down", "mid", "up").index) and len(blocks) == 17
    assert not any(
        "attn2.to_k" in name or "proj" in name.split(".")[-1] for layers in blocks.values() for name in layers if "ff" not in name
    )


def test_reconstruct_refuses_recipes_without_4_bits_and_no_prompts(pipeline, tmp_path):
    from stepquant.hosts.diffusers.reconstruct import reconstruct

    with pytest.raises(SchemeError, match="no 4-bit Linears"):
        reconstruct(pipeline, _recipe(pipeline.unet, inside="nothing"), PROMPTS, tmp_path)
    with pytest.raises(CalibrationError, match="no prompts"):
        reconstruct(pipeline, _recipe(pipeline.unet), [], tmp_path)


def test_reconstruction_cost_counts_what_is_run(pipeline):
    from stepquant.hosts.diffusers.reconstruct import reconstructed_layers
    from stepquant.hosts.diffusers.reconstruct_cost import reconstruction_cost

    blocks = reconstructed_layers(pipeline.unet, _recipe(pipeline.unet))
    short, long = (reconstruction_cost(pipeline.unet, blocks, 2, _quick(iterations)) for iterations in (100, 200))
    assert short.blocks == 2 and short.samples == 4  # one call of two prompts, with guidance
    assert short.unet_calls == 2 + 1  # sampled once; both blocks hang on one entry, reached in both UNets by half a call each
    weights = sum(parameter.numel() for parameter in pipeline.unet.mid_block.attentions[0].transformer_blocks.parameters())
    assert long.operations - short.operations == 2 * weights * 8 * 8 * 3 * 100 * 2
    assert short.memory_bytes > 4 * weights  # of two blocks, in fp32, several copies of one
