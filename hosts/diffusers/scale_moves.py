"""Moves scales between layers of a diffusers UNet's transformer blocks, exactly: the function stays the same, the tensors between don't.

    LayerNorm -> q, k, v and ff.net.0        norm weight and bias * f[c], columns / f[c]
    value half of ff.net.0 -> ff.net.2       rows * f[c], columns / f[c]  (the gate is left alone)
    V -> to_out                              rows * f[c], columns / f[c]
Convolutions after SiLU take no part: SiLU(f x) is not f SiLU(x). Chooses no factors (see quant/smoothing.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# Layers that read what one move scales, and the layer that writes it; None where a LayerNorm does.
READERS: Mapping[str, tuple[str, ...]] = {
    "norm1": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "norm2": ("attn2.to_q",),
    "norm3": ("ff.net.0.proj",),
    "value": ("ff.net.2",),
    "attn1": ("attn1.to_out.0",),
    "attn2": ("attn2.to_out.0",),
}
WRITERS: Mapping[str, str] = {"value": "ff.net.0.proj", "attn1": "attn1.to_v", "attn2": "attn2.to_v"}


def transformer_blocks(unet: nn.Module) -> dict[str, nn.Module]:
    """The blocks that moves are made in, by module name."""
    return {name: module for name, module in unet.named_modules() if hasattr(module, "attn1") and hasattr(module, "norm3")}


@torch.no_grad()
def move_scales(unet: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Multiply channels between layers, in place.

    Args: factors: (K,) > 0 by block and site (`mid_block.attentions.0.transformer_blocks.0.norm1`); sites that are not in it stay.
    """
    for path, block in transformer_blocks(unet).items():
        for site, readers in READERS.items():
            factor = factors.get(f"{path}.{site}")
            if factor is None:
                continue
            factor = factor.to(block.norm1.weight)
            if site in WRITERS:
                _scale_rows(block.get_submodule(WRITERS[site]), factor)
            else:
                norm = block.get_submodule(site)
                norm.weight.mul_(factor)
                norm.bias.mul_(factor)
            for reader in readers:
                block.get_submodule(reader).weight.div_(factor)


def _scale_rows(writer: nn.Linear, factor: Tensor) -> None:
    """The first rows, as many as there are factors: GEGLU's values come before its gates."""
    rows = len(factor)
    writer.weight[:rows].mul_(factor[:, None])
    if writer.bias is not None:
        writer.bias[:rows].mul_(factor)
