"""The demo model's modules, built with random weights from `model/config.json`; loads no trained weights (see pipeline.py)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

MODEL_DIR = Path(__file__).parent / "model"

# SDXL's latent scale: ComfyUI multiplies every SDXL latent by it before the UNet sees it.
SDXL_LATENT_SCALE = 0.13025


def read_config() -> dict[str, dict]:
    """Constructor arguments by component: unet, text_encoder, text_encoder_2, vae, scheduler."""
    return json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))


def build_unet() -> UNet2DConditionModel:
    """UNet of SDXL's topology, 64/128/128 channels, 13.4 M parameters, fp32.

    Convolutions that end a residual branch, and the last one, start at zero: the untrained network is then
    the identity on its residual stream, which is what lets a short training use a large learning rate.
    """
    unet = UNet2DConditionModel(**read_config()["unet"])
    for name, parameter in unet.named_parameters():
        if name.startswith("conv_out.") or ".proj_out." in name or ".conv2." in name:
            torch.nn.init.zeros_(parameter)
    return unet


def build_text_encoders(
    vocab_size: int | None = None, eos_token_id: int | None = None
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """CLIP text encoders L (128 wide) and G (192 wide, with projection), fp32.

    Args:
        vocab_size, eos_token_id: given together by the trainer, which keeps only the token rows that captions
            use; left out, CLIP's own 49,408 rows.
    """
    config = read_config()
    sections = [dict(config[name]) for name in ("text_encoder", "text_encoder_2")]
    for section in sections:
        if vocab_size is not None:
            section.update(vocab_size=vocab_size, eos_token_id=eos_token_id, bos_token_id=0, pad_token_id=0)
    encoder_l = CLIPTextModel(CLIPTextConfig(**sections[0]))
    return encoder_l, CLIPTextModelWithProjection(CLIPTextConfig(**sections[1]))


def build_vae() -> AutoencoderTiny:
    """Autoencoder of TAESD's architecture: (B, 3, 8H, 8W) in [-1, 1] <-> (B, 4, H, W) of unit variance, 2.4 M parameters."""
    return AutoencoderTiny(**read_config()["vae"])


def build_scheduler() -> EulerDiscreteScheduler:
    """Euler sampler on SDXL's noise schedule."""
    return EulerDiscreteScheduler(**read_config()["scheduler"])


def encode_prompt_ids(
    encoder_l: torch.nn.Module, encoder_g: torch.nn.Module, ids_l: torch.Tensor, ids_g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text context and pooled embedding, as SDXL makes them: penultimate layers side by side, G's projection.

    Args:
        ids_l, ids_g: (B, 77) int64 token ids, padded each in its encoder's own way.
    Returns: context (B, 77, 320) and pooled (B, 192), in the encoders' dtype.
    """
    out_l = encoder_l(ids_l, output_hidden_states=True)
    out_g = encoder_g(ids_g, output_hidden_states=True)
    return torch.cat([out_l.hidden_states[-2], out_g.hidden_states[-2]], dim=-1), out_g.text_embeds
