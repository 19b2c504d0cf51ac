"""Gives the attention layers of a diffusers UNet the recipe's schemes, as attention processors."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from ...errors import SchemeError
from ...quant.log2_attention import AttentionMode, AttentionScheme
from ..attention import attend
from ..key_mapping import diffusers_to_ldm, ldm_to_diffusers


class QuantizedAttentionProcessor(AttnProcessor2_0):
    """Attention by `scheme`; with a mask, or on inputs that are no token rows, what its base class does."""

    def __init__(self, scheme: AttentionScheme) -> None:
        super().__init__()
        self.scheme = scheme

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: object,
        **kwargs: object,
    ) -> Tensor:
        """hidden_states: (B, Tq, C). encoder_hidden_states: (B, T, C_text), None for self-attention. Returns: (B, Tq, C)."""
        special = attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross
        if attention_mask is not None or hidden_states.ndim != 3 or any(special):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (_heads(x, attn.heads) for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        y = attend(q, k, v, self.scheme, encoder_hidden_states)
        y = attn.to_out[1](attn.to_out[0](y.transpose(1, 2).flatten(2)))
        y = y + hidden_states if attn.residual_connection else y
        return y / attn.rescale_output_factor


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * d) -> (B, heads, T, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention_layers(unet: nn.Module) -> list[str]:
    """LDM names of all attention layers, self-attention (attn1) and cross-attention (attn2)."""
    names = (name for name, module in unet.named_modules() if isinstance(module, Attention))
    return [diffusers_to_ldm(f"{name}.to_q.weight").removesuffix(".to_q.weight") for name in names]


def check_attention(unet: nn.Module, schemes: Mapping[str, AttentionScheme]) -> None:
    """Raise SchemeError if a name is no attention layer of the UNet."""
    layers = set(attention_layers(unet)) if schemes else set()
    for name in schemes:
        if name not in layers:
            raise SchemeError(f"{name}: in the recipe, but no attention layer of this UNet. Make the recipe for this model.")


def set_attention(unet: nn.Module, schemes: Mapping[str, AttentionScheme]) -> None:
    """Give attention layers their schemes, by LDM name; FLOAT gives back the engine's own. Others stay as they are."""
    for name, scheme in schemes.items():
        processor = AttnProcessor2_0() if scheme.mode is AttentionMode.FLOAT else QuantizedAttentionProcessor(scheme)
        unet.get_submodule(ldm_to_diffusers(f"{name}.to_q.weight").removesuffix(".to_q.weight")).set_processor(processor)
