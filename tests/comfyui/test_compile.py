"""Quantized layers under torch.compile: one graph each, the same result, no graph break for weights, buckets or branches."""

import pytest
import torch

from stepquant.hosts.comfy.lora import quantized_layers

LINEAR = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
CONV = "diffusion_model.input_blocks.4.0.in_layers.2.weight"


@pytest.mark.parametrize("branch", [False, True], ids=["plain", "with_lora"])
@pytest.mark.parametrize(("key", "shape"), [(LINEAR, (2, 16, 64)), (CONV, (2, 32, 8, 8))], ids=["linear", "conv"])
def test_compiled_layer_is_one_graph_with_the_same_result(quantized, add_lora, unet_call, key, shape, branch):
    patcher = add_lora(quantized) if branch else quantized
    patcher.load(torch.device("cpu"), full_load=True)
    unet_call(patcher, (3.0, 0.5))
    layer = dict(quantized_layers(patcher.model))[key]
    assert (layer.branch is not None) == branch
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
