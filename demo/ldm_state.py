"""The demo model's parameters under SDXL's own key names and back; plain dicts of tensors, no files, no modules.

A token table is stored with its used rows alone: 49,408 x 320 numbers would outweigh the UNet.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..hosts.key_mapping import diffusers_to_ldm, ldm_to_diffusers
from ..quant.text_encoder import CLIP_G_NAMES
from .architecture import SDXL_LATENT_SCALE

UNET_PREFIX = "model.diffusion_model."
CLIP_L_PREFIX = "conditioner.embedders.0.transformer.text_model."
CLIP_G_PREFIX = "conditioner.embedders.1.model."
VAE_PREFIX = "first_stage_model."
TOKEN_TABLES = (CLIP_L_PREFIX + "embeddings.token_embedding.weight", CLIP_G_PREFIX + "token_embedding.weight")
# (rows,) int32: the token id of each stored row, ascending. Ours, not SDXL's.
USED_TOKEN_IDS = "used_token_ids"


def unet_to_ldm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers UNet state -> `model.diffusion_model.*`; tensors are shared, not copied."""
    return {UNET_PREFIX + diffusers_to_ldm(key): value for key, value in state.items()}


def unet_from_ldm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `unet_to_ldm`; other keys are left out."""
    return {ldm_to_diffusers(key): value for key, value in _with_prefix(state, UNET_PREFIX).items()}


def vae_to_ldm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers AutoencoderTiny state -> `first_stage_model.taesd_*`, which ComfyUI recognises.

    vae_scale undoes SDXL's latent scale, so that our latents reach the UNet as they are, at unit variance.
    """
    out = {VAE_PREFIX + "vae_scale": torch.tensor(SDXL_LATENT_SCALE), VAE_PREFIX + "vae_shift": torch.tensor(0.0)}
    for key, value in state.items():
        side, index, rest = re.match(r"(encoder|decoder)\.layers\.(\d+)\.(.+)$", key).groups()
        # TAESD's decoder counts its clamp as layer 0; diffusers does the clamp outside the list.
        out[f"{VAE_PREFIX}taesd_{side}.{int(index) + (side == 'decoder')}.{rest}"] = value
    return out


def vae_from_ldm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `vae_to_ldm`; vae_scale and vae_shift are left out, being constants of the export."""
    out = {}
    for key, value in _with_prefix(state, VAE_PREFIX + "taesd_").items():
        side, index, rest = key.split(".", 2)
        out[f"{side}.layers.{int(index) - (side == 'decoder')}.{rest}"] = value
    return out


def text_to_ldm(state_l: dict[str, Tensor], state_g: dict[str, Tensor], used_ids: Tensor) -> dict[str, Tensor]:
    """States of both text encoders -> `conditioner.embedders.*`, with the ids of the stored token rows.

    Args:
        state_l, state_g: as transformers names them (with or without `text_model.`), token tables (rows, width).
        used_ids: (rows,) integer token ids, ascending.
    """
    out = {CLIP_L_PREFIX + key.removeprefix("text_model."): value for key, value in state_l.items()}
    state_g = {key.removeprefix("text_model."): value for key, value in state_g.items()}
    for key, value in state_g.items():
        if key == "text_projection.weight":
            out[CLIP_G_PREFIX + "text_projection"] = value.T.contiguous()
        elif ".self_attn.q_proj." in key:
            parts = [state_g[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name = key.replace("encoder.layers.", "transformer.resblocks.").replace("self_attn.q_proj.", "attn.in_proj_")
            out[CLIP_G_PREFIX + name] = torch.cat(parts)
        elif ".self_attn.k_proj." not in key and ".self_attn.v_proj." not in key:
            out[CLIP_G_PREFIX + _replace_all(key, CLIP_G_NAMES)] = value
    out[USED_TOKEN_IDS] = used_ids.to(torch.int32)
    return out


def text_from_ldm(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """States of encoders L and G, in transformers' names without `text_model.`, from a full-vocabulary LDM state."""
    names = {ldm: hf for hf, ldm in CLIP_G_NAMES.items()}
    state_g = {}
    for key, value in _with_prefix(state, CLIP_G_PREFIX).items():
        if key == "text_projection":
            state_g["text_projection.weight"] = value.T.contiguous()
        elif ".attn.in_proj_" in key:
            name = key.replace("transformer.resblocks.", "encoder.layers.")
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                state_g[name.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = rows.contiguous()
        else:
            state_g[_replace_all(key, names)] = value
    return _with_prefix(state, CLIP_L_PREFIX), state_g


def expand_token_tables(state: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """A copy of the state with whole token tables (vocab_size, width) and no `used_token_ids`.

    Tokens never trained get the mean of the trained ones: a neutral word rather than noise.
    """
    state = dict(state)
    used_ids = state.pop(USED_TOKEN_IDS).long()
    for key in TOKEN_TABLES:
        rows = state[key]  # (rows, width)
        table = rows.float().mean(0).to(rows.dtype).repeat(vocab_size, 1)
        table[used_ids] = rows
        state[key] = table
    return state


def _with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _replace_all(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        key = key.replace(old, new)
    return key
