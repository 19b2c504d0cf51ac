"""Attention by scheme in ComfyUI, through its `optimized_attention_override`. An override that is there already stays in the chain."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...quant.log2_attention import AttentionMode, AttentionScheme
from ..attention import attend

OVERRIDE = "optimized_attention_override"
BLOCKS = {"input": "input_blocks.{}.1", "middle": "middle_block.1", "output": "output_blocks.{}.1"}


class AttentionOverride:
    """What ComfyUI calls in the place of its attention function, with that function as the first argument.

    schemes: by LDM name. previous: the override that was set before, or None; it gets every call that has no scheme, a mask, or
    a layout that schemes do not serve.
    """

    def __init__(self, schemes: Mapping[str, AttentionScheme], previous: Callable | None = None) -> None:
        self.schemes = dict(schemes)
        self.previous = previous

    def __call__(self, function: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: object, **kwargs: object) -> Tensor:
        """q: (B, Tq, heads * d), k, v: (B, T, heads * d), or split into heads already if skip_reshape. Returns: (B, Tq, heads * d)."""
        scheme = self.schemes.get(layer_name(kwargs.get("transformer_options") or {}, q, k))
        masked = kwargs.get("mask") is not None or bool(args)
        split = kwargs.get("skip_reshape") or kwargs.get("skip_output_reshape") or q.ndim != 3
        if scheme is None or scheme.mode is AttentionMode.FLOAT or masked or split:
            return self._pass_on(function, q, k, v, heads, *args, **kwargs)
        queries, keys, values = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        # The context itself does not come here; a start token's keys are as much larger as it is.
        tokens = k if k.shape[1] != q.shape[1] else None
        return attend(queries, keys, values, scheme, tokens).transpose(1, 2).flatten(2)

    def _pass_on(self, function: Callable, *args: object, **kwargs: object) -> Tensor:
        if self.previous is None:
            return function(*args, **kwargs)
        return self.previous(function, *args, **kwargs)


def layer_name(options: Mapping, q: Tensor, k: Tensor) -> str | None:
    """LDM name of the attention layer that ComfyUI is in; None outside the UNet's transformer blocks.

    Cross-attention has as many keys as the prompt has tokens, self-attention as many as queries; neither is said in the options.
    """
    block, index = options.get("block"), options.get("block_index")
    if block is None or index is None or block[0] not in BLOCKS:
        return None
    kind = "attn1" if k.shape[1] == q.shape[1] else "attn2"
    return f"{BLOCKS[block[0]].format(block[1])}.transformer_blocks.{index}.{kind}"


def set_attention(patcher: ModelPatcher, schemes: Mapping[str, AttentionScheme]) -> None:
    """Give a MODEL's attention layers their schemes; call it on a clone. Called again, it replaces its own schemes alone."""
    options = patcher.model_options.setdefault("transformer_options", {})
    previous = options.get(OVERRIDE)
    if isinstance(previous, AttentionOverride):
        previous = previous.previous
    if schemes:
        options[OVERRIDE] = AttentionOverride(schemes, previous)
    elif previous is not None:
        options[OVERRIDE] = previous
    else:
        options.pop(OVERRIDE, None)
