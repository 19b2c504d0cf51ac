"""ComfyUI node folder without nodes: makes the stock loaders recognise the demo model's size. For tests and the demo only.

Copy or link it into `custom_nodes/`. The full-size SDXL needs nothing of it.
"""

from typing import ClassVar

import comfy.sdxl_clip
import comfy.supported_models
from comfy.supported_models_base import ClipTarget

TEXT_CONFIGS = {
    "clip_l_model_config": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
    },
    "clip_g_model_config": {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_attention_heads": 3,
        "num_hidden_layers": 6,
    },
}


class DemoSDXLClipModel(comfy.sdxl_clip.SDXLClipModel):
    """SDXL's pair of text encoders at the demo model's widths."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device=device, dtype=dtype, model_options={**TEXT_CONFIGS, **(model_options or {})})


class DemoSDXL(comfy.supported_models.SDXL):
    """SDXL in miniature; ComfyUI matches `unet_config` against what it reads from a file's shapes."""

    unet_config: ClassVar = {
        "model_channels": 64,
        "use_linear_in_transformer": True,
        "transformer_depth": [0, 0, 1, 1, 2, 2],
        "context_dim": 320,
        "adm_in_channels": 1728,
        "use_temporal_attention": False,
    }
    unet_extra_config: ClassVar = {"num_heads": -1, "num_head_channels": 64}

    def clip_target(self, state_dict=None):
        return ClipTarget(comfy.sdxl_clip.SDXLTokenizer, DemoSDXLClipModel)


# The loader tries the list in order; by name, because a reload makes a new class object.
if all(model.__name__ != "DemoSDXL" for model in comfy.supported_models.models):
    comfy.supported_models.models.insert(0, DemoSDXL)

NODE_CLASS_MAPPINGS = {}
