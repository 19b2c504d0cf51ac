"""For tests of the bound blocks: the same model without them, one UNet call, and what the producers were asked."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import tiny_sdxl
import torch

from stepquant.kernels import dispatch

PRODUCERS = ("layer_norm_quantize", "geglu_quantize", "int8_geglu_gemm", "fp8_geglu_gemm", "group_norm_silu_quantize")


@contextmanager
def layer_by_layer(patcher):
    """Without our forwards on the blocks: ComfyUI's classes do every call, each layer quantizes its own input."""
    modules = [module for module in patcher.model.diffusion_model.modules() if "forward" in module.__dict__]
    assert modules
    forwards = [module.__dict__.pop("forward") for module in modules]
    try:
        yield
    finally:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward


@contextmanager
def producer_calls():
    """Counts the calls of the fused producers."""
    counts, originals = Counter(), {name: getattr(dispatch, name) for name in PRODUCERS}

    def counting(name):
        def call(*args, **kwargs):
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in PRODUCERS:
        setattr(dispatch, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dispatch, name, original)


def unet_call(patcher, options=None, control=None, batch: int = 2, side: int = 8, seed: int = 0) -> torch.Tensor:
    """The UNet itself on random inputs, with a timestep of its own for each sample."""
    generator = torch.Generator().manual_seed(seed)
    patcher.load(torch.device("cpu"), full_load=True)
    patcher.pre_run()
    x = torch.randn(batch, 4, side, side, generator=generator)
    context = torch.randn(batch, 77, tiny_sdxl.CLIP_L + tiny_sdxl.CLIP_G, generator=generator)
    timesteps = torch.linspace(900, 100, batch)
    y = torch.zeros(batch, tiny_sdxl.CLIP_G + 1536)
    control = control and {name: [tensor.clone() for tensor in tensors] for name, tensors in control.items()}
    return patcher.model.diffusion_model(x, timesteps, context=context, y=y, control=control, transformer_options=dict(options or {}))


def calls_of(patcher, kind):
    """(block, arguments, keywords, output) of every block of a kind in a UNet call layer by layer."""
    calls = []

    def record(block, args, kwargs, output):
        options = {name: dict(value) if name == "transformer_options" else value for name, value in kwargs.items()}
        calls.append((block, args, options, output))

    with layer_by_layer(patcher):
        blocks = [module for module in patcher.model.diffusion_model.modules() if type(module).__name__ == kind]
        handles = [block.register_forward_hook(record, with_kwargs=True) for block in blocks]
        unet_call(patcher)
    for handle in handles:
        handle.remove()
    return calls
