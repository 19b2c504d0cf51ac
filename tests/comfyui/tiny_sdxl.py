"""A thin SDXL with random weights for tests: SDXL's topology in 8 M parameters, opened by ComfyUI's stock loaders.

`register()` adds the architecture to ComfyUI's list; the builders write checkpoints and LoRAs. Same seed, same bytes.
"""

from __future__ import annotations

import comfy.ops
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.taesd.taesd
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.supported_models_base import ClipTarget
from safetensors.torch import save_file

CLIP_L, CLIP_G = 64, 64  # widths of the two text encoders
CHANNELS = 32
TEXT_ENCODERS = {
    f"clip_{which}_model_config": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 3}
    for which in "lg"
}


class WithWeights(comfy.ops.disable_weight_init):
    """Under dynamic VRAM ComfyUI's own Linears have no weights before a file is loaded into them."""

    Linear = torch.nn.Linear


class TinyTextEncoders(comfy.sdxl_clip.SDXLClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device=device, dtype=dtype, model_options={**TEXT_ENCODERS, **(model_options or {})})


class TinySDXL(comfy.supported_models.SDXL):
    unet_config = {  # noqa: RUF012 - ComfyUI's own convention
        "model_channels": CHANNELS,
        "use_linear_in_transformer": True,
        "transformer_depth": [0, 0, 1, 1, 2, 2],
        "context_dim": CLIP_L + CLIP_G,
        "adm_in_channels": CLIP_G + 1536,
        "use_temporal_attention": False,
    }
    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}  # noqa: RUF012

    def clip_target(self, state_dict=None):
        return ClipTarget(comfy.sdxl_clip.SDXLTokenizer, TinyTextEncoders)


def register() -> None:
    if not any(model.__name__ == TinySDXL.__name__ for model in comfy.supported_models.models):
        comfy.supported_models.models.insert(0, TinySDXL)


def unet_tensors(seed: int = 0, in_channels: int = 4) -> dict[str, torch.Tensor]:
    """fp16 UNet tensors by LDM name, without prefix."""
    config = {
        **TinySDXL.unet_config,
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "num_classes": "sequential",
        "in_channels": in_channels,
        "out_channels": 4,
        "num_res_blocks": [2, 2, 2],
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth_middle": 2,
        "num_head_channels": 32,
        "dtype": torch.float32,
    }
    return _random(UNetModel(**config, operations=WithWeights), seed)


def write_unet(path, seed: int = 0, in_channels: int = 4, **markers: torch.Tensor) -> None:
    tensors = {"model.diffusion_model." + key: tensor for key, tensor in unet_tensors(seed, in_channels).items()}
    save_file({**tensors, **markers}, str(path))


def write_checkpoint(path, seed: int = 0) -> None:
    """UNet, text encoders and VAE, as CheckpointLoaderSimple opens them."""
    config = TinySDXL(TinySDXL.unet_config)
    tensors = {"model.diffusion_model." + key: tensor for key, tensor in unet_tensors(seed).items()}
    tensors.update(config.process_clip_state_dict_for_saving(_random(TinyTextEncoders(dtype=torch.float32), seed + 1)))
    vae = _random(comfy.taesd.taesd.TAESD(), seed + 2)
    vae["vae_scale"], vae["vae_shift"] = torch.ones_like(vae["vae_scale"]), torch.zeros_like(vae["vae_shift"])
    tensors.update({"first_stage_model." + key: tensor for key, tensor in vae.items()})
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, str(path))


def lora_tensors(seed: int = 0, only: str = "") -> dict[str, torch.Tensor]:
    """A LoRA of rank 4 in kohya's key names on two Linears and two convs; `only` keeps the keys that contain it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, outputs, inputs, kernel in (
        ("input_blocks_4_1_transformer_blocks_0_attn1_to_q", 64, 64, 0),
        ("middle_block_1_transformer_blocks_0_ff_net_0_proj", 1024, 128, 0),
        ("input_blocks_4_0_in_layers_2", 64, 32, 3),
        ("input_blocks_4_0_skip_connection", 64, 32, 1),
    ):
        if only in name:
            spatial = (kernel, kernel) if kernel else ()
            down = torch.randn(4, inputs, *spatial, generator=generator) * 0.3 / (inputs * max(1, kernel) ** 2) ** 0.5
            up = torch.randn(outputs, 4, *(1 for _ in spatial), generator=generator) * 0.5
            tensors[f"lora_unet_{name}.lora_down.weight"] = down.half()
            tensors[f"lora_unet_{name}.lora_up.weight"] = up.half()
            tensors[f"lora_unet_{name}.alpha"] = torch.tensor(4.0)
    return tensors


def _random(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """fp16 tensors of the module's shapes: matrices of unit gain, norms 1, biases small."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            tensors[name] = tensor
        elif tensor.ndim >= 2:
            tensors[name] = (torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5).half()
        elif name.endswith("weight"):
            tensors[name] = torch.ones(tensor.shape).half()
        else:
            tensors[name] = (0.05 * torch.randn(tensor.shape, generator=generator)).half()
    return tensors
