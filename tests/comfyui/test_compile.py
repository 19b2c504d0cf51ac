"""Quantized models under torch.compile: a layer is one operation, the UNet is traced once, LoRAs need no second time.

With blocks of our own the UNet is not traced at all. Whether the picture is right is tried in contracts/test_compiled.py.
"""

import copy

import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from fake_graph import use_fake_graphs
from sampling_run import sample_latent
from torch._dynamo.utils import counters

from stepquant.hosts.comfy.lora import quantized_layers
from stepquant.hosts.comfy.quantize import quantize_model

LINEAR = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
CONV = "diffusion_model.input_blocks.4.0.in_layers.2.weight"
# The float UNet is 1,214 operations; traced into the layers it was 13,613, and took minutes.
MOST_OPERATIONS = 2000


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def _operations() -> int:
    return counters["stats"]["calls_captured"]


def _frames() -> int:
    return counters["frames"]["total"]


def _whole(patcher):
    """What TorchCompileModel gives, with a backend that only traces."""
    compiled = patcher.clone(disable_dynamic=True)
    set_torch_compile_wrapper(model=compiled, backend="eager")
    return compiled


@pytest.fixture
def layer_by_layer(model):
    return quantize_model(model, "w8a8-token", acceleration="off")


@pytest.mark.parametrize("branch", [False, True], ids=["plain", "with_lora"])
@pytest.mark.parametrize(("key", "shape"), [(LINEAR, (2, 16, 64)), (CONV, (2, 32, 8, 8))], ids=["linear", "conv"])
def test_compiled_layer_is_one_operation_with_the_same_result(quantized, add_lora, unet_call, key, shape, branch):
    patcher = add_lora(quantized) if branch else quantized
    patcher.load(torch.device("cpu"), full_load=True)
    unet_call(patcher, (3.0, 0.5))
    layer = dict(quantized_layers(patcher.model))[key]
    assert (layer.branch is not None) == branch
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda x: layer(x), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    assert _operations() <= 2  # it, and moving the bucket to the input's device


def test_compiled_copy_of_a_layer_uses_its_own_weights(layer_by_layer):
    layer = layer_by_layer.model.diffusion_model.middle_block[1].proj_in
    other = copy.deepcopy(layer, {id(layer.weight): layer.weight})  # QuantizedTensors refuse to be copied
    other.requantize(layer.weight.dequantize().float() * 2)
    x = torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(0))
    for one in (layer, other):
        assert torch.equal(torch.compile(lambda x, one=one: one(x), backend="eager")(x), one(x))


def test_whole_unet_is_traced_once_and_loras_do_not_trace_it_again(layer_by_layer, add_lora):
    compiled = _whole(layer_by_layer)
    assert torch.equal(sample_latent(compiled), sample_latent(layer_by_layer))
    assert (_frames(), counters["stats"]["unique_graphs"]) == (1, 1)
    assert _operations() < MOST_OPERATIONS and not counters["graph_break"]
    for seed in range(3):
        assert torch.equal(sample_latent(add_lora(compiled, seed=seed)), sample_latent(add_lora(layer_by_layer, seed=seed)))
    assert _frames() == 1


@pytest.mark.parametrize("mode", ["fused", "auto"])
def test_unet_with_blocks_of_our_own_is_not_traced(model, add_lora, mode):
    quantized = quantize_model(model, "w8a8-token", acceleration=mode)
    if mode == "auto":
        use_fake_graphs(quantized)
    compiled = _whole(quantized)
    for size in ((8, 8), (9, 13), (16, 8)):
        assert torch.equal(sample_latent(compiled, size=size), sample_latent(quantized, size=size))
    assert torch.equal(sample_latent(add_lora(compiled)), sample_latent(add_lora(quantized)))
    assert _operations() == 0 and _frames() <= 2  # the call around it, and once more when it has another size
    if mode == "auto":
        assert quantized.model.stepquant.runner.replays


def test_compiling_without_breaks_says_what_to_set(quantized):
    compiled = quantized.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="set acceleration to off"):
        sample_latent(compiled)
