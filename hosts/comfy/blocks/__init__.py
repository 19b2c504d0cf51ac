"""Forwards of our own on the blocks of a UNet that our loader built: parameters, names and classes stay ComfyUI's.

Each begins with one test and otherwise calls its class's forward; see the file of the block.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..kv_cache import CrossAttentionCache
from .call_scope import CallScope
from .edges import ChannelsLastConv, FusedExit
from .joined import JoinableOutput
from .res_block import FusedResBlock
from .spatial import FusedSpatialTransformer
from .transformer import FusedFeedForward, FusedTransformerBlock
from .unet import ScopedUNet
from .upsample import FusedUpsample

__all__ = ["bind"]
JOINABLE = (FusedResBlock, FusedSpatialTransformer, FusedUpsample)


def bind(unet: nn.Module, state: Any) -> None:
    """Bind the fused forwards, and give the model's QuantizedState its K/V cache and its CallScope.

    The layers must have their codes, names and schemes: these decide what can be fused. Copies made with deepcopy get
    forwards of their own.
    """
    scope, cache = CallScope(state.tap), CrossAttentionCache(unet)
    state.kv_cache, state.scope = cache, scope
    # Inner modules first: an outer block remembers which forwards it found below itself.
    for name, module in reversed(list(unet.named_modules())):
        if "forward" in module.__dict__:  # another pack's
            continue
        if FusedFeedForward.fits(module):
            module.forward = FusedFeedForward(module, scope).forward
        elif FusedTransformerBlock.fits(module):
            module.forward = FusedTransformerBlock(module, name, scope, cache).forward
        elif FusedResBlock.fits(module):
            module.forward = FusedResBlock(module, scope).forward
        elif FusedSpatialTransformer.fits(module):
            module.forward = FusedSpatialTransformer(module, scope).forward
        elif FusedUpsample.fits(module):
            module.forward = FusedUpsample(module, scope).forward
    _bind_edges(unet)
    _bind_joins(unet)
    if "forward" not in unet.__dict__:
        unet.forward = ScopedUNet(unet, scope, cache).forward


def _bind_edges(unet: nn.Module) -> None:
    first, last = unet.input_blocks[0][0], unet.out
    if isinstance(first, nn.Conv2d) and "forward" not in vars(first):
        first.forward = ChannelsLastConv(first).forward
    if FusedExit.fits(last) and "forward" not in vars(last):
        last.forward = FusedExit(last).forward


def _bind_joins(unet: nn.Module) -> None:
    """What is joined with a skip: the results of the middle block and of all output blocks but the last, where the forward is ours."""
    for block in [unet.middle_block, *unet.output_blocks[:-1]] if unet.middle_block is not None else ():
        last = block[-1]
        if isinstance(getattr(vars(last).get("forward"), "__self__", None), JOINABLE):
            last.forward = JoinableOutput(last.forward).forward
