"""Layers in channel groups (DGQ) on a live MODEL: the reference's result, LoRAs and merges in the model's order, files of both engines."""

import re
from collections import Counter

import comfy.sd
import comfy_extras.nodes_model_merging as merging
import pytest
import tiny_sdxl
import torch
from fused_blocks import layer_by_layer, producer_calls, unet_call
from safetensors.torch import load_file, save_file
from sampling_run import conditioning

from stepquant.errors import CalibrationError
from stepquant.hosts.comfy import plan
from stepquant.hosts.comfy.calibrate import calibrate
from stepquant.hosts.comfy.compare import compare_models
from stepquant.hosts.comfy.layouts import unpack
from stepquant.hosts.comfy.loader import load_quantized
from stepquant.hosts.comfy.lora import quantized_layers
from stepquant.hosts.comfy.quantize import quantizable_layers, quantize_model
from stepquant.hosts.comfy.sampling import SamplerSettings
from stepquant.hosts.comfy.save import save_quantized
from stepquant.hosts.diffusers.layers import QuantizedConv2d, QuantizedLinear
from stepquant.nodes.quantize import StepQuantQuantize
from stepquant.quant.calibration import Calibration
from stepquant.quant.file_format import read_model
from stepquant.quant.layers import has_symmetric_input, needs_row_scales
from stepquant.quant.plan_program import Budget
from stepquant.quant.recipe import Recipe, preset_recipe
from stepquant.quant.scheme import ActivationMode, Scheme
from stepquant.quant.sensitivity import LayerSensitivity
from stepquant.quant.sqnr import sqnr_db
from stepquant.quant.timestep import uniform_groups
from stepquant.quant.weight import dequantize_weight, quantize_weight

SETTINGS = SamplerSettings(steps=4, cfg=4.0, sampler_name="euler", scheduler="normal")
TO_Q = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
CONV = "input_blocks.4.0.in_layers.2"
LAYERS = [TO_Q, CONV, "input_blocks.4.0.skip_connection", "middle_block.1.transformer_blocks.0.ff.net.2"]
UNET = "diffusion_model."


def latent() -> dict:
    return {"samples": torch.zeros(1, 4, 8, 8)}


# The norm before, and the Linears that read it.
READERS = {"norm1": ["attn1.to_q", "attn1.to_k", "attn1.to_v"], "norm2": ["attn2.to_q"], "norm3": ["ff.net.0.proj"]}


@pytest.fixture(scope="module")
def unet_file(tmp_path_factory) -> str:
    """The tiny UNet with channels that stand out, as SDXL has them: some of each LayerNorm are 64 times as large, and the
    weights that read them as much smaller, so that the function is the same."""
    path = tmp_path_factory.mktemp("models") / "outliers.safetensors"
    tiny_sdxl.write_unet(path)
    tensors = load_file(path)
    for key in [key for key in tensors if ".transformer_blocks." in key and key.endswith("norm1.weight")]:
        block = key.removesuffix("norm1.weight")
        for norm, readers in READERS.items():
            for part in ("weight", "bias"):
                tensors[f"{block}{norm}.{part}"][::21] *= 64
            for reader in readers:
                tensors[f"{block}{reader}.weight"][:, ::21] /= 64
    save_file(tensors, str(path))
    return str(path)


@pytest.fixture
def model(unet_file):
    return comfy.sd.load_diffusion_model(unet_file)


@pytest.fixture(scope="module")
def made(unet_file, tmp_path_factory):
    """(calibration, file of the model in channel groups, buffers of its MODEL), made once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(unet_file)
        calibration = calibrate(model, conditioning(1), conditioning(2), latent(), 5, SETTINGS)
        quantized = quantize_model(model, grouped_recipe(model), calibration)
        path = tmp_path_factory.mktemp("models") / "grouped.safetensors"
        save_quantized(quantized, path)
        buffers = {key: layer.weight._qdata.clone() for key, layer in quantized_layers(quantized.model)}
    torch.set_num_threads(threads)
    return calibration, path, buffers


@pytest.fixture
def calibration(made):
    return made[0]


@pytest.fixture
def few_layers(monkeypatch):
    """A recipe is made for one block only: choosing among modes tries each on all recorded rows."""

    def found(model):
        return {name: spec for name, spec in quantizable_layers(model).items() if name.startswith("input_blocks.4.")}

    monkeypatch.setattr(plan, "quantizable_layers", found)


@pytest.fixture
def file(made):
    return made[1]


@pytest.fixture
def grouped(file):
    return load_quantized(file).model


def grouped_recipe(model, granularity: int = 8) -> Recipe:
    """Channel groups wherever a recipe may have them, on token and on static scales in turn."""
    schemes = {}
    for index, name in enumerate(quantizable_layers(model)):
        base = (ActivationMode.STATIC, ActivationMode.TOKEN)[index % 2]
        groups = {"channel_groups": 3, "granularity": granularity, "group_base": base}
        symmetric = base is ActivationMode.TOKEN or has_symmetric_input(name)
        wide = model.model.diffusion_model.get_submodule(name).weight.shape[1] > 2 * granularity
        scheme = Scheme(activation=ActivationMode.CHANNEL_GROUP, symmetric=symmetric, **groups)
        schemes[name] = scheme if wide and not needs_row_scales(name) else Scheme()
    return Recipe(schemes, "test", "test", uniform_groups(4))


def groups_of(patcher) -> dict:
    parts = {key.removeprefix(UNET).removesuffix(".weight"): unpack(layer.weight) for key, layer in quantized_layers(patcher.model)}
    return {name: part.groups for name, part in parts.items() if part.groups is not None}


def test_quantize_puts_every_wide_layer_into_groups(grouped):
    found = groups_of(grouped)
    assert len(found) > 40 and set(LAYERS) <= found.keys()
    assert len(found[TO_Q].borders) > 1, "outliers are worth a group of their own"
    sizes = Counter(len(groups.borders) for groups in found.values())
    assert max(sizes) <= 3 and sizes[1] < 0.5 * len(found)


@pytest.mark.parametrize("name", LAYERS)
def test_grouped_layer_computes_what_the_diffusers_engine_computes(grouped, file, name):
    unet_call(grouped)  # leaves the tap at two timesteps
    layer, stored = grouped.model.diffusion_model.get_submodule(name), read_model(file).layers[name]
    scheme = layer.scheme
    stored.bias = None if stored.bias is None else stored.bias.float()
    if layer.weight.ndim == 4:
        reference = QuantizedConv2d(name, scheme, stored, layer.tap, layer.stride[0], layer.padding[0])
        x = torch.randn(2, layer.weight.shape[1], 9, 7, generator=torch.Generator().manual_seed(0))
    else:
        reference = QuantizedLinear(name, scheme, stored, layer.tap)
        x = torch.randn(2, 30, layer.weight.shape[1], generator=torch.Generator().manual_seed(0))
    assert scheme.is_grouped
    assert torch.equal(layer(x), reference(x))


def test_grouped_weight_dequantizes_in_the_models_order(grouped, model):
    for name in LAYERS:
        layer, plain = grouped.model.diffusion_model.get_submodule(name), model.model.diffusion_model.get_submodule(name).weight
        quantized = quantize_weight(plain, name)
        assert not torch.equal(unpack(layer.weight).qweight, quantized.codes)
        assert torch.equal(layer.weight.dequantize(), dequantize_weight(quantized.codes, quantized.scale, torch.float32))


def test_grouped_model_is_nearer_to_the_original_than_one_scale_per_layer(grouped, model, calibration):
    def sqnr(quantized) -> float:
        compared = compare_models(model, quantized, PixelVae(), conditioning(1), conditioning(2), latent(), 5, SETTINGS)
        assert compared.integer_share == pytest.approx(1.0)
        return compared.step_sqnr.mean_db()

    assert sqnr(grouped) > sqnr(quantize_model(model, "w8a8-static", calibration)) + 3


class PixelVae:
    def decode(self, latents):
        return (latents[:, :3] / 8 + 0.5).movedim(1, -1)


def test_fused_blocks_leave_grouped_layers_to_themselves(grouped, relative_error):
    with producer_calls() as counts:
        fused = unet_call(grouped)
    assert not counts["layer_norm_quantize"] and not counts["group_norm_silu_quantize"] and not counts["int8_geglu_gemm"]
    # Not bit for bit: blocks hand on other memory layouts, float sums run in another order, and one code at a tie grows in a random UNet.
    with layer_by_layer(grouped):
        assert relative_error(fused, unet_call(grouped)) < 0.05


def test_lora_runs_exactly_beside_grouped_layers(grouped, add_lora):
    layer = grouped.model.diffusion_model.get_submodule(TO_Q)
    x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    unet_call(grouped)
    plain, codes = layer(x), layer.weight._qdata.clone()
    with_lora = add_lora(grouped)
    unet_call(with_lora)
    difference = with_lora.patch_weight_to_device(f"{UNET}{TO_Q}.weight", return_weight=True) - layer.weight.dequantize()
    assert torch.allclose(layer(x) - plain, x @ difference.t(), atol=1e-4) and difference.abs().max() > 0.01
    assert torch.equal(layer.weight._qdata, codes)


def test_merged_patch_keeps_the_groups_and_gives_the_patched_weight(grouped, sample):
    base, before = sample(grouped), groups_of(grouped)[CONV].borders
    delta = torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(3)) * 0.05
    patched, layer = grouped.clone(), grouped.model.diffusion_model.get_submodule(CONV)
    expected = layer.weight.dequantize() + delta
    patched.add_patches({f"{UNET}{CONV}.weight": ("diff", (delta,))})
    assert not torch.equal(sample(patched), base)
    assert groups_of(patched)[CONV].borders == before
    step = unpack(layer.weight).weight_scale.view(-1, 1, 1, 1)
    assert ((layer.weight.dequantize() - expected).abs() <= 0.51 * step).all()
    assert torch.equal(sample(grouped), base), "the base's codes came back"


def test_model_merge_and_stock_save_write_the_right_weights(grouped, model, sample, tmp_path):
    plain = model.model.diffusion_model.get_submodule(TO_Q).weight
    (mixed,) = merging.ModelMergeSimple().merge(grouped, model, 0.25)
    sample(mixed)
    layer = mixed.model.diffusion_model.get_submodule(TO_Q)
    half_steps = unpack(layer.weight).weight_scale.view(-1, 1)
    assert ((layer.weight.dequantize() - plain).abs() <= half_steps).all()
    merging.save_checkpoint(grouped, filename_prefix="stock", output_dir=str(tmp_path))
    (path,) = tmp_path.glob("stock*.safetensors")
    assert torch.allclose(load_file(path)[f"model.{UNET}{TO_Q}.weight"].float(), plain.float(), atol=float(half_steps.max()))


def test_hook_lora_on_grouped_layers_leaves_nothing_behind(grouped, sample, snapshot):
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora=tiny_sdxl.lora_tensors(0), strength_model=1.0, strength_clip=0.0)
    base, before = sample(grouped), snapshot(grouped)
    assert not torch.equal(sample(grouped, hooks=hooks), base)
    after = snapshot(grouped)
    assert torch.equal(sample(grouped), base) and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("memory", [1, 2_000_000])
def test_partial_load_computes_the_same_in_groups(grouped, unet_call, memory):
    full = unet_call(grouped, (3.0,))
    grouped.detach()
    grouped.load(torch.device("cpu"), lowvram_model_memory=memory, full_load=False)
    assert torch.equal(unet_call(grouped, (3.0,)), full)


def test_file_brings_the_groups_back_bit_for_bit(made, grouped, file, tmp_path):
    buffers = {key: layer.weight._qdata for key, layer in quantized_layers(grouped.model)}
    assert buffers.keys() == made[2].keys() and all(torch.equal(buffers[key], made[2][key]) for key in buffers)
    save_quantized(grouped, tmp_path / "again.safetensors")
    first, second = load_file(file), load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert read_model(file).layers[TO_Q].channel_exponents.shape == (8,)


def test_seamless_tiling_edits_run_in_float_in_the_models_order(grouped):
    layer = grouped.model.diffusion_model.get_submodule(CONV)
    x = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    unet_call(grouped, batch=1)
    layer.padding_mode = "circular"
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
    expected = torch.nn.functional.conv2d(padded, layer.weight.dequantize(), layer.bias)
    layer._reversed_padding_repeated_twice = [1, 1, 1, 1]
    assert torch.allclose(layer(x), expected, atol=1e-4)


def test_compiled_grouped_layer_is_one_graph_with_the_same_result(grouped):
    unet_call(grouped)
    for name, shape in ((TO_Q, (2, 16, 64)), (CONV, (2, 32, 8, 8))):
        layer, x = grouped.model.diffusion_model.get_submodule(name), torch.randn(shape, generator=torch.Generator().manual_seed(0))
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, layer=layer: layer(x), backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))


def test_plan_offers_channel_groups_and_quantize_follows_it(model, calibration, few_layers):
    flat = {name: LayerSensitivity(found.buckets[:1], *torch.ones(2, 1).double()) for name, found in calibration.layers.items()}
    known = Calibration(calibration.layers, calibration.summary, flat)
    made = plan.plan_model(model, known, "uniform", 4, Budget(integer_share=1.0), channel_groups=4, granularity=8)
    chosen = {name for name, label in made.choices.items() if label.startswith("channel_group")}
    assert TO_Q in chosen
    assert groups_of(quantize_model(model, made.recipe, calibration)).keys() == chosen


def test_measured_recipe_takes_the_best_mode_of_each_layer(model, calibration, few_layers):
    seen = []
    recipe = plan.measured_model_recipe(model, calibration, 4, 8, 4, progress=lambda done, total: seen.append((done, total)))
    modes = Counter(scheme.activation for scheme in recipe.schemes.values())
    assert modes[ActivationMode.CHANNEL_GROUP] > 3 and len(modes) > 1
    assert seen[-1] == (len(recipe.schemes), len(recipe.schemes))
    static = preset_recipe("w8a8-static", recipe.schemes, 4)
    reference = unet_call(model)
    measured, plain = (sqnr_db(reference, unet_call(quantize_model(model, one, calibration))) for one in (recipe, static))
    assert measured > plain + 3


def test_quantize_node_measures_and_says_how_many_layers_are_grouped(model, calibration, few_layers):
    quantized, summary = StepQuantQuantize.execute(model, "w8a8-measured", 4, calibration, channel_groups=4, granularity="8").args
    # 16, or 8 where that measured 2 dB better.
    assert re.search(rf"{len(groups_of(quantized))} layers in channel groups of (8|16|8, 16) channels", summary)
    with pytest.raises(CalibrationError, match="preset w8a8-measured: no calibration is connected"):
        StepQuantQuantize.execute(model, "w8a8-measured")


def diffusers_unet() -> torch.nn.Module:
    """tiny_sdxl's architecture as diffusers builds it, random weights."""
    from diffusers import UNet2DConditionModel

    from stepquant.hosts.diffusers.sdxl_config import UNET as SDXL

    width = tiny_sdxl.CHANNELS
    return UNet2DConditionModel(
        **SDXL
        | {
            "block_out_channels": (width, 2 * width, 4 * width),
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (1, 2, 4),
            "cross_attention_dim": tiny_sdxl.CLIP_L + tiny_sdxl.CLIP_G,
            "projection_class_embeddings_input_dim": tiny_sdxl.CLIP_G + 1536,
        }
    )


def test_both_engines_load_the_file_and_compute_the_same(made, grouped, file, tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed: the other engine is not tested here")
    from stepquant.hosts.diffusers import unet_file

    unet = unet_file.load(diffusers_unet(), file)
    generator = torch.Generator().manual_seed(4)
    x, timesteps = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([900.0, 100.0])
    context = torch.randn(2, 77, tiny_sdxl.CLIP_L + tiny_sdxl.CLIP_G, generator=generator)
    pooled, sizes = torch.randn(2, tiny_sdxl.CLIP_G, generator=generator), torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2)
    embedded = unet.add_time_proj(sizes.flatten()).view(2, -1)
    theirs = unet(x, timesteps, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}, return_dict=False)[0]
    grouped.load(torch.device("cpu"), full_load=True)
    ours = grouped.model.diffusion_model(x, timesteps, context=context, y=torch.cat([pooled, embedded], 1))
    # The engines add in another order: codes that lie on the edge of two fall either way, and random weights amplify it.
    assert sqnr_db(theirs, ours) > 40
    unet_file.save(unet, tmp_path / "diffusers.safetensors")
    back = load_quantized(tmp_path / "diffusers.safetensors").model
    assert all(torch.equal(layer.weight._qdata, made[2][key]) for key, layer in quantized_layers(back.model))
