"""A LoRA and a ControlNet of the demo model's size with random weights, as files that ComfyUI's own loaders open."""

from __future__ import annotations

from pathlib import Path

import comfy.cldm.cldm
import comfy.ops
import torch
from safetensors.torch import save_file

WIDTH = 128  # of the demo UNet's attention layers
ATTENTION = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
CONFIG = {
    "image_size": 32,
    "in_channels": 4,
    "hint_channels": 3,
    "model_channels": 64,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 2],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_middle": 2,
    "context_dim": 320,
    "adm_in_channels": 1728,
    "num_classes": "sequential",
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
}


def write_lora(path: Path, rank: int = 4) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = {"lora_down.weight": (rank, WIDTH), "lora_up.weight": (WIDTH, rank)}
    tensors = {f"{ATTENTION}.{part}": 0.05 * torch.randn(shape, generator=generator) for part, shape in parts.items()}
    save_file({**tensors, f"{ATTENTION}.alpha": torch.tensor(float(rank))}, str(path))


def write_controlnet(path: Path) -> None:
    net = comfy.cldm.cldm.ControlNet(**CONFIG, operations=comfy.ops.disable_weight_init, dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in net.state_dict().items():
        scale = 0.3 / max(1, tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.01
        norm = tensor.ndim == 1 and name.endswith("weight")
        tensors[f"control_model.{name}"] = (
            torch.ones(tensor.shape) if norm else scale * torch.randn(tensor.shape, generator=generator)
        ).half()
    save_file(tensors, str(path))
