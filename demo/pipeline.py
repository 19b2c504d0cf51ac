"""Opens the shipped demo model as a diffusers SDXL pipeline. Reads the files in `model/`, never the network."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from .architecture import MODEL_DIR, build_scheduler, build_text_encoders, build_unet, build_vae
from .ldm_state import expand_token_tables, text_from_ldm, unet_from_ldm, vae_from_ldm
from .tokenizer import VOCAB_SIZE, build_tokenizers

COMPONENT_FILES = ("unet.safetensors", "text_encoders.safetensors", "vae.safetensors")


def load_demo_pipeline(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", model_dir: Path = MODEL_DIR
) -> StableDiffusionXLPipeline:
    """The trained demo model: 256 x 256 pictures of emoji-like things from a prompt.

    Args:
        dtype: the weights are stored in fp16 and converted. float32 is the choice on a CPU.
        device: where all modules go.
        model_dir: folder of the three weight files, left out: the shipped ones.
    Raises: FileNotFoundError if a file of `demo/model/` is missing.
    """
    state = read_demo_state(model_dir)
    encoder_l, encoder_g = build_text_encoders()
    state_l, state_g = text_from_ldm(expand_token_tables(state, VOCAB_SIZE))
    load_module_state(encoder_l, state_l)
    load_module_state(encoder_g, state_g)
    unet, vae = build_unet(), build_vae()
    load_module_state(unet, unet_from_ldm(state))
    load_module_state(vae, vae_from_ldm(state))
    tokenizer_l, tokenizer_g = build_tokenizers()
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoder_l,
        text_encoder_2=encoder_g,
        tokenizer=tokenizer_l,
        tokenizer_2=tokenizer_g,
        unet=unet,
        scheduler=build_scheduler(),
        # The unconditional half was trained on the encoded empty caption, as ComfyUI samples; not on zeros.
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    for module in (vae, encoder_l, encoder_g, unet):
        module.eval().requires_grad_(False)
    return pipeline.to(device=device, dtype=dtype)


def read_demo_state(model_dir: Path = MODEL_DIR) -> dict[str, torch.Tensor]:
    """All stored tensors, fp16, under SDXL's key names; token tables hold the used rows only."""
    return {key: value for name in COMPONENT_FILES for key, value in load_file(model_dir / name).items()}


def load_module_state(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load a component's whole state, named as its library names it; raises RuntimeError on any difference."""
    # transformers moved CLIP's parameters in and out of a `text_model.` child between releases.
    wanted = module.state_dict().keys()
    renamed = {key if key in wanted else f"text_model.{key}": value for key, value in state.items()}
    module.load_state_dict(renamed, strict=True)
