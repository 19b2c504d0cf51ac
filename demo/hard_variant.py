"""A variant of the demo model that computes the same function but whose activations are as hard to quantize as SDXL's.

Only scales move (hosts/diffusers/scale_moves.py): one channel in a hundred grows between layers. And the text context gets one more
channel, 0 but for start tokens, which no weight reads. Convolutions after SiLU can't be hardened so. Which channels and how far:
hard_match.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..hosts.diffusers.scale_moves import READERS, move_scales, transformer_blocks
from ..quant.log2_attention import CHUNK

FACTORS_FILE = Path(__file__).parent / "hard_factors.json"
# absmax of SDXL's start token in the text context, among tokens of about 10 (MixDQ, section 4.1).
START_VALUE = 800.0
EXTRA_CHANNELS = 8  # of which one is used: rows of codes stay a multiple of 8

# By block and site (`mid_block.attentions.0.transformer_blocks.0.norm1`), the channels that grow and how many times.
Factors = Mapping[str, Mapping[int, float]]


def read_factors(file: Path = FACTORS_FILE) -> Factors:
    """The shipped demo model's factors, matched to SDXL-Turbo's real figures by hard_match.py."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    return {site: {int(channel): factor for channel, factor in channels.items()} for site, channels in stored.items()}


@torch.no_grad()
def harden(unet: nn.Module, factors: Factors) -> nn.Module:
    """A copy of a diffusers SDXL UNet with outliers in its transformer blocks and its text context; the same function.

    Args: factors: sites that are not in it stay as they are. Give it the original's text context: the copy widens it.
    """
    hard = copy.deepcopy(unet)
    vectors = {}
    for path, block in transformer_blocks(hard).items():
        for site, readers in READERS.items():
            if f"{path}.{site}" in factors:
                vectors[f"{path}.{site}"] = _vector(block.get_submodule(readers[0]).in_features, factors[f"{path}.{site}"])
        for layer in (block.attn2.to_k, block.attn2.to_v):
            layer.weight = nn.Parameter(nn.functional.pad(layer.weight, (0, EXTRA_CHANNELS)), requires_grad=False)
            layer.in_features += EXTRA_CHANNELS
    move_scales(hard, vectors)
    hard.register_forward_pre_hook(_widen_context, with_kwargs=True)
    return hard


def _vector(size: int, channels: Mapping[int, float]) -> Tensor:
    factor = torch.ones(size)
    for channel, value in channels.items():
        factor[channel] = value
    return factor


def _widen_context(unet: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    context = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
    if context.shape[-1] != unet.config.cross_attention_dim:
        return args, kwargs  # a recorded call, which was widened when it was recorded
    wide = nn.functional.pad(context, (0, EXTRA_CHANNELS))
    wide[:, ::CHUNK, context.shape[-1]] = START_VALUE  # CLIP puts a start token first in every chunk
    if "encoder_hidden_states" in kwargs:
        return args, kwargs | {"encoder_hidden_states": wide}
    return (*args[:2], wide, *args[3:]), kwargs
