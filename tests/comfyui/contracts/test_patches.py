"""Nodes that reach into the UNet: guidance, frequency and token tricks, skipped blocks."""

import random

import pytest
import torch
from sampling_run import sample_latent
from stock_nodes import NODES

from .artist import with_deep_cache


@pytest.mark.parametrize("node", NODES)
def test_stock_node(contract, node):
    def use(model):
        torch.manual_seed(0)  # some of them draw
        random.seed(0)
        return sample_latent(NODES[node](model), size=(16, 16))

    contract(node, use)


def test_deep_cache(contract):
    contract("DeepCache-like (blocks skipped)", lambda model: sample_latent(with_deep_cache(model), steps=4))


def test_attention_override(contract):
    """The slot that attention packs (SageAttention and others) use."""

    def use(model):
        patched = model.clone()
        patched.model_options["transformer_options"]["optimized_attention_override"] = lambda function, *args, **kwargs: (
            1.2 * function(*args, **kwargs)
        )
        return sample_latent(patched)

    contract("attention override of another pack", use)


def test_function_wrapper(contract):
    def use(model):
        patched = model.clone()
        patched.set_model_unet_function_wrapper(lambda apply, call: 0.9 * apply(call["input"], call["timestep"], **call["c"]))
        return sample_latent(patched)

    contract("UNet function wrapper of another pack", use)
