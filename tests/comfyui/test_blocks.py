"""Blocks with forwards of our own: the same result as layer by layer, and ComfyUI's own forward wherever anything patches them."""

import copy
import gc
import random
import weakref

import comfy.ldm.modules.attention as attention
import pytest
import torch
from fused_blocks import calls_of, layer_by_layer, producer_calls, unet_call
from stock_nodes import NODES
from torch import nn

from stepquant.hosts.comfy.attach import counting_macs
from stepquant.hosts.comfy.lora import quantized_layers
from stepquant.hosts.comfy.quantize import quantizable_layers, quantize_model
from stepquant.quant.recipe import Recipe
from stepquant.quant.scheme import FP8, ActivationMode, ComputeType, Scheme

# Tensors are fp32 here, so nothing is rounded between producer and quantizer, and on equal inputs a block is exact.
SAME_BLOCK = 1e-6
SAME_FP8 = 0.05  # a block quantizes GEGLU's values by one scale for all rows, a layer by one for each
# From block to block images stay channels_last, so that float norms and convolutions add in another order. That moves a
# code by one where a value lies between two, which is another draw of quantization noise: 0.1 in this random UNet.
# Measured: up to 0.03.
SAME = 0.05
BLOCK, LAYER = "input_blocks.4.1.transformer_blocks.0", "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
TRANSFORMER_BLOCKS, RES_BLOCKS, SPATIAL = 17, 17, 11


def _static(model, symmetric: bool):
    """Stored scales in every layer, two timestep groups; the ranges are guessed, which saturates alike in both paths."""
    quantized = quantize_model(model, "w8a8-token")
    for key, layer in quantized_layers(quantized.model):
        if "attn2.to_k" in key or "attn2.to_v" in key or "emb_layers" in key:
            continue
        weight = layer.weight.dequantize()
        layer.scheme = Scheme(activation=ActivationMode.STATIC, symmetric=symmetric)
        layer.act_scale = torch.where(torch.arange(64) < 32, 4 / 127, 5 / 127)
        layer.act_zero_point = None if symmetric else torch.full((64,), -20, dtype=torch.int32)
        if not symmetric:
            _with_sums(layer, weight)
    return quantized


def _with_sums(layer, weight) -> None:
    from stepquant.hosts.comfy.layouts import make_weight, unpack

    parts = unpack(layer.weight)
    layer.weight = nn.Parameter(make_weight(parts.qweight, parts.weight_scale, True, weight.dtype), requires_grad=False)


@pytest.fixture
def modes(model):
    return {
        "token": lambda: quantize_model(model, "w8a8-token"),
        "static": lambda: _static(model, True),
        "asymmetric": lambda: _static(model, False),
        "fp8": lambda: quantize_model(model, Recipe(dict.fromkeys(quantizable_layers(model), FP8), "test", "test")),
    }


@pytest.mark.parametrize("mode", ["token", "static", "asymmetric"])
@pytest.mark.parametrize(("batch", "side"), [(1, 8), (2, 16), (3, 8)])
def test_fused_blocks_give_what_layer_by_layer_gives(modes, relative_error, mode, batch, side):
    patcher = modes[mode]()
    with producer_calls() as calls:
        fused = unet_call(patcher, batch=batch, side=side)
    with layer_by_layer(patcher), producer_calls() as none:
        expected = unet_call(patcher, batch=batch, side=side)
    assert not none
    assert calls == {
        "layer_norm_quantize": 3 * TRANSFORMER_BLOCKS,
        "int8_geglu_gemm": TRANSFORMER_BLOCKS,
        "group_norm_silu_quantize": 2 * RES_BLOCKS + SPATIAL,
    }
    assert relative_error(fused, expected) < SAME


@pytest.mark.parametrize(
    ("kind", "number", "producers"),
    [("BasicTransformerBlock", 17, 4), ("FeedForward", 17, 1), ("ResBlock", 17, 2), ("SpatialTransformer", 11, None), ("Upsample", 2, 0)],
)
@pytest.mark.parametrize("mode", ["token", "static", "asymmetric", "fp8"])
def test_each_fused_block_gives_what_its_class_gives(modes, relative_error, mode, kind, number, producers):
    calls = calls_of(modes[mode](), kind)
    with producer_calls() as counts:
        errors = [relative_error(block(*args, **kwargs), output) for block, args, kwargs, output in calls]
    assert len(errors) == number
    assert counts.total() == (number + 4 * TRANSFORMER_BLOCKS if producers is None else number * producers)
    has_one_scale = mode == "fp8" and kind in ("BasicTransformerBlock", "SpatialTransformer")
    assert max(errors) <= (SAME_FP8 if has_one_scale else SAME_BLOCK)


@pytest.mark.parametrize("mode", ["token", "asymmetric", "fp8"])
@pytest.mark.parametrize("target", [None, (8, 8), (7, 8), (12, 8)])
def test_upsample_repeats_codes_at_exactly_twice_the_size(modes, monkeypatch, mode, target):
    patcher = modes[mode]()
    unet_call(patcher)
    upsample = patcher.model.diffusion_model.output_blocks[2][2]
    x = torch.randn(2, upsample.channels, 4, 4, generator=torch.Generator().manual_seed(2))
    shape = None if target is None else torch.Size((2, 1, *target))
    with layer_by_layer(patcher):
        expected = upsample(x, output_shape=shape)
    enlarged, interpolate = [], torch.nn.functional.interpolate
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda *args, **kwargs: enlarged.append(1) or interpolate(*args, **kwargs))
    assert torch.equal(upsample(x, output_shape=shape), expected)
    assert bool(enlarged) == (target not in (None, (8, 8)))


def test_fused_blocks_sample_like_layer_by_layer(quantized, sample, relative_error):
    fused = sample(quantized, steps=3, batch=2)
    assert torch.equal(sample(quantized, steps=3, batch=2), fused)
    with layer_by_layer(quantized):
        assert relative_error(fused, sample(quantized, steps=3, batch=2)) < SAME


def test_fused_blocks_count_the_same_multiply_adds(quantized):
    with counting_macs(quantized.model) as counter:
        unet_call(quantized)
    with layer_by_layer(quantized), counting_macs(quantized.model) as expected:
        unet_call(quantized)
    assert counter.total_by_layer == expected.total_by_layer
    assert counter.integer_by_layer == expected.integer_by_layer and counter.integer_share() == 1.0


@pytest.mark.parametrize("kept", ["attn1.to_k", "ff.net.0.proj", "ff.net.2", "to_out.0", "in_layers.2", "proj_in", "proj_out"])
@pytest.mark.parametrize("how", ["sixteen_bit", "float_compute"])
def test_layers_of_other_schemes_run_on_their_own(model, relative_error, kept, how):
    scheme = Scheme(activation=ActivationMode.FP16, compute=ComputeType.FP16)
    schemes = {name: scheme if name.endswith(kept) else Scheme() for name in quantizable_layers(model)}
    if how == "sixteen_bit":
        schemes = {name: one for name, one in schemes.items() if not name.endswith(kept)}
    patcher = quantize_model(model, Recipe(schemes, "test", "test"))
    fused = unet_call(patcher)
    with layer_by_layer(patcher):
        assert relative_error(fused, unet_call(patcher)) < SAME


def test_q_k_and_v_of_different_tables_are_quantized_one_by_one(model, relative_error):
    patcher = _static(model, True)
    with producer_calls() as before:
        unet_call(patcher)
    for key, layer in quantized_layers(patcher.model):
        if key.endswith("attn1.to_v.weight"):
            layer.act_scale = layer.act_scale * 1.25  # new tables, as another calibration would bring
    with producer_calls() as after:
        fused = unet_call(patcher)
    assert before["layer_norm_quantize"] - after["layer_norm_quantize"] == TRANSFORMER_BLOCKS
    with layer_by_layer(patcher):
        assert relative_error(fused, unet_call(patcher)) < SAME


def _scaled(calls):
    def patch(first, *rest):
        calls.append(1)
        tensors = [tensor for tensor in rest if isinstance(tensor, torch.Tensor)]
        return (1.5 * first, *tensors) if tensors else 1.5 * first

    return patch


def _attend_backwards(calls):
    def replace(q, k, v, extra_options):
        calls.append(1)
        return attention.attention_pytorch(q, k.flip(1), v, extra_options["n_heads"])

    return replace


def _override(calls):
    def override(function, *args, **kwargs):
        calls.append(1)
        return 1.5 * function(*args, **kwargs)

    return override


def _handle_embedding(calls):
    def handler(layer, x, emb, context, *_):
        calls.append(1)
        emb.mul_(1.01)  # rude, but possible: SiLU must not be shared then
        return layer(x, emb)

    return (type(None), handler), (_res_block(), handler)


def _res_block():
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    return ResBlock


def _patching(name):
    return lambda calls: {"patches": {name: [_scaled(calls)]}}


PATCHES = {
    **{
        name: _patching(name)
        for name in (
            "attn1_patch", "attn2_patch", "attn1_output_patch", "attn2_output_patch", "middle_patch",
            "input_block_patch", "input_block_patch_after_skip", "output_block_patch",
        )
    },
    "attn1_replace": lambda calls: {"patches_replace": {"attn1": {("middle", 0): _attend_backwards(calls)}}},
    "attn1_replace_one": lambda calls: {"patches_replace": {"attn1": {("input", 7, 1): _attend_backwards(calls)}}},
    "attn2_replace": lambda calls: {"patches_replace": {"attn2": {("input", 4): _attend_backwards(calls)}}},
    "attention_override": lambda calls: {"optimized_attention_override": _override(calls)},
    "emb_patch": lambda calls: {"patches": {"emb_patch": [lambda emb, *_: calls.append(1) or 1.5 * emb]}},
    "embedding_in_place": lambda calls: {"patches": {"forward_timestep_embed_patch": list(_handle_embedding(calls))}},
    "middle_block_after": lambda calls: {
        "patches": {"middle_block_after_patch": [lambda call: calls.append(1) or {**call, "h": 1.5 * call["h"]}]}
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", PATCHES)
def test_every_patch_is_called_and_has_its_effect(quantized, relative_error, kind):
    plain, calls = unet_call(quantized), []
    patched = unet_call(quantized, PATCHES[kind](calls))
    number = len(calls)
    with layer_by_layer(quantized):
        expected = unet_call(quantized, PATCHES[kind](calls))
    assert number > 0 and len(calls) == 2 * number
    assert relative_error(patched, expected) < min(SAME, 0.6 * relative_error(patched, plain))


@pytest.mark.parametrize("kind", ["attn1_patch", "attn2_replace"])
def test_only_the_blocks_that_are_patched_step_aside(quantized, kind):
    with producer_calls() as calls:
        unet_call(quantized, PATCHES[kind]([]))
    aside = TRANSFORMER_BLOCKS if kind == "attn1_patch" else 1
    assert calls["layer_norm_quantize"] == 3 * (TRANSFORMER_BLOCKS - aside)
    assert calls["geglu_quantize"] == aside  # the feed-forward is bound by itself
    assert calls["int8_geglu_gemm"] == TRANSFORMER_BLOCKS - aside


def test_patches_see_where_they_are(quantized):
    seen = {"fused": [], "stock": []}

    def note(path):
        return {"patches": {"middle_patch": [lambda x, extra: seen[path].append(_place(extra)) or x]}}

    def _place(extra):
        return extra["block"], extra["block_index"], extra["activations_shape"], extra["transformer_index"], extra["n_heads"]

    unet_call(quantized, note("fused"))
    with layer_by_layer(quantized):
        unet_call(quantized, note("stock"))
    assert seen["fused"] == seen["stock"] and len(seen["fused"]) == TRANSFORMER_BLOCKS


def test_control_is_added(quantized, relative_error):
    generator = torch.Generator().manual_seed(3)
    control = {"output": [torch.randn(2, 32, 8, 8, generator=generator)], "middle": [torch.randn(2, 128, 2, 2, generator=generator)]}
    controlled = unet_call(quantized, control=control)
    with layer_by_layer(quantized):
        assert relative_error(controlled, unet_call(quantized, control=control)) < SAME
    assert relative_error(controlled, unet_call(quantized)) > SAME


@pytest.mark.parametrize("node", NODES)
def test_stock_nodes_that_patch_the_unet_work_as_before(quantized, sample, relative_error, node):
    def run():
        torch.manual_seed(0)
        random.seed(0)
        return sample(NODES[node](quantized), steps=2)

    fused = run()
    with layer_by_layer(quantized):
        assert relative_error(fused, run()) < 2 * SAME  # every step adds its own


def test_hooks_on_layers_are_called(quantized):
    names, seen, handles = [name for name, _ in quantized_layers(quantized.model)], set(), []
    for key in names:
        module = quantized.model.get_submodule(key.removesuffix(".weight"))
        handles.append(module.register_forward_pre_hook(lambda *_, key=key: seen.add(key)))
    with producer_calls() as calls:
        unet_call(quantized)
    for handle in handles:
        handle.remove()
    assert seen == set(names) and not calls
    with producer_calls() as calls:
        unet_call(quantized)
    assert calls


def test_a_hook_on_one_layer_makes_its_block_step_aside(quantized):
    block, inputs = quantized.model.diffusion_model.get_submodule(BLOCK), []
    handle = block.norm2.register_forward_hook(lambda module, given, output: inputs.append(output) or 0 * output)
    with producer_calls() as calls:
        changed = unet_call(quantized)
    handle.remove()
    assert len(inputs) == 1 and calls["layer_norm_quantize"] == 3 * (TRANSFORMER_BLOCKS - 1)
    assert not torch.equal(changed, unet_call(quantized))


def _replace_forward(unet, monkeypatch):
    layer = unet.get_submodule(LAYER)
    monkeypatch.setitem(layer.__dict__, "forward", lambda x: 0 * type(layer).forward(layer, x))


def _replace_module(unet, monkeypatch):
    monkeypatch.setitem(unet.get_submodule(BLOCK).attn1._modules, "to_q", nn.Linear(64, 64))


def _replace_class_forward(unet, monkeypatch):
    stock = attention.CrossAttention.forward
    monkeypatch.setattr(attention.CrossAttention, "forward", lambda *args, **kwargs: 0 * stock(*args, **kwargs))


def _replace_block_class(unet, monkeypatch):
    class Merged(attention.BasicTransformerBlock):
        def forward(self, x, context=None, transformer_options=None):
            return 0.5 * super().forward(x, context, transformer_options)

    monkeypatch.setattr(unet.get_submodule(BLOCK), "__class__", Merged)


@pytest.mark.parametrize("replace", [_replace_forward, _replace_module, _replace_class_forward, _replace_block_class])
def test_what_other_packs_replace_is_used(quantized, monkeypatch, relative_error, replace):
    torch.manual_seed(0)
    plain = unet_call(quantized)
    with monkeypatch.context() as patched:
        replace(quantized.model.diffusion_model, patched)
        changed = unet_call(quantized)
        with layer_by_layer(quantized):
            _ = replace is _replace_forward and replace(quantized.model.diffusion_model, patched)
            expected = unet_call(quantized)
    assert relative_error(changed, expected) < SAME < relative_error(changed, plain)
    assert torch.equal(unet_call(quantized), plain)


def test_seamless_tiling_pads_around_the_edge(quantized, monkeypatch, relative_error):
    plain = unet_call(quantized)
    for module in quantized.model.diffusion_model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            monkeypatch.setattr(module, "padding_mode", "circular")
            monkeypatch.setattr(module, "_reversed_padding_repeated_twice", [1, 1, 1, 1], raising=False)
    tiled = unet_call(quantized)
    with layer_by_layer(quantized):
        assert relative_error(tiled, unet_call(quantized)) < SAME < relative_error(tiled, plain)


def test_loras_run_beside_fused_layers(quantized, add_lora, relative_error):
    plain, patcher = unet_call(quantized), add_lora(quantized)
    with producer_calls() as calls:
        fused = unet_call(patcher)
    assert calls["layer_norm_quantize"] == 3 * TRANSFORMER_BLOCKS  # the branch gets the norm's floats
    with layer_by_layer(patcher):
        assert relative_error(fused, unet_call(patcher)) < SAME < relative_error(fused, plain)
    assert torch.equal(unet_call(quantized), plain)


@pytest.mark.parametrize("memory", [1, 2_000_000])
def test_weights_fetched_layer_by_layer_give_the_same(quantized, memory):
    full = unet_call(quantized)
    quantized.detach()
    quantized.load(torch.device("cpu"), lowvram_model_memory=memory, full_load=False)
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 128, generator=generator)
    unet = quantized.model.diffusion_model
    assert torch.equal(unet(x, torch.linspace(900, 100, 2), context=context, y=torch.zeros(2, 1600), transformer_options={}), full)


def test_a_deep_copy_runs_on_its_own_weights(quantized, relative_error):
    expected = unet_call(quantized)
    unet = quantized.model.diffusion_model
    copied = copy.deepcopy(unet, {id(weight): weight for weight in unet.parameters()})  # QuantizedTensors refuse to be copied
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 128, generator=generator)

    def call():
        return copied(x, torch.linspace(900, 100, 2), context=context, y=torch.zeros(2, 1600), transformer_options={})

    with producer_calls() as calls:
        assert torch.equal(call(), expected)
    assert calls["layer_norm_quantize"] == 3 * TRANSFORMER_BLOCKS
    handle = copied.get_submodule(LAYER).register_forward_hook(lambda module, given, output: 0 * output)
    assert relative_error(call(), expected) > SAME
    handle.remove()
    norm = copied.get_submodule(BLOCK).norm1
    norm.weight = nn.Parameter(torch.zeros_like(norm.weight), requires_grad=False)
    assert relative_error(call(), expected) > SAME
    assert torch.equal(unet_call(quantized), expected)


def test_a_model_is_freed_at_once(model):
    patcher = quantize_model(model, "w8a8-token")
    blocks = [weakref.ref(module) for module in patcher.model.diffusion_model.modules()]
    gc.collect()
    gc.disable()
    try:
        del patcher
        assert not any(block() for block in blocks)
    finally:
        gc.enable()


def test_blocks_called_alone_are_whole(quantized, relative_error):
    unet_call(quantized)
    block = quantized.model.diffusion_model.get_submodule(BLOCK)
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 16, 64, generator=generator), torch.randn(2, 77, 128, generator=generator)
    fused = block(x, context)
    with layer_by_layer(quantized):
        assert relative_error(fused, block(x, context)) < SAME_BLOCK


def test_half_precision_differs_by_its_rounding_only(quantized, relative_error):
    block = quantized.model.diffusion_model.get_submodule(BLOCK)
    unet_call(quantized)
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 16, 64, generator=generator), torch.randn(2, 77, 128, generator=generator)
    exact = block(x, context)
    fused = block(x.half(), context.half())
    assert fused.dtype == torch.float16
    with layer_by_layer(quantized):
        unfused = block(x.half(), context.half())
    # Fusing rounds less often, so it is no farther from the fp32 result.
    assert relative_error(fused.float(), exact) < 1.1 * relative_error(unfused.float(), exact)


def test_compiled_blocks_are_comfyuis_own(quantized, relative_error):
    unet_call(quantized)
    block = quantized.model.diffusion_model.get_submodule(BLOCK)
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 16, 64, generator=generator), torch.randn(2, 77, 128, generator=generator)
    torch._dynamo.reset()
    with producer_calls() as calls:
        compiled = torch.compile(block, backend="eager")(x, context)
    assert not calls
    assert relative_error(compiled, block(x, context)) < SAME_BLOCK
