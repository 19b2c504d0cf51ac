"""A thin SDXL refiner with random weights: the refiner's topology in ComfyUI's list of models, and its file."""

from __future__ import annotations

import comfy.supported_models
import tiny_sdxl
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors.torch import save_file


class TinyRefiner(comfy.supported_models.SDXLRefiner):
    unet_config = {  # noqa: RUF012 - ComfyUI's own convention
        "model_channels": 32,
        "use_linear_in_transformer": True,
        "context_dim": tiny_sdxl.CLIP_G,
        "adm_in_channels": tiny_sdxl.CLIP_G + 1280,
        "transformer_depth": [0, 0, 1, 1, 1, 1, 0, 0],
        "use_temporal_attention": False,
    }
    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}  # noqa: RUF012


def write_refiner(path) -> None:
    if not any(model.__name__ == TinyRefiner.__name__ for model in comfy.supported_models.models):
        comfy.supported_models.models.insert(0, TinyRefiner)
    config = {
        **TinyRefiner.unet_config,
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "num_classes": "sequential",
        "in_channels": 4,
        "out_channels": 4,
        "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth_middle": 1,
        "num_head_channels": 32,
    }
    net = UNetModel(**config, operations=tiny_sdxl.WithWeights)
    save_file({"model.diffusion_model." + key: tensor for key, tensor in tiny_sdxl._random(net, 30).items()}, str(path))
