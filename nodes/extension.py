"""What ComfyUI asks the pack for: the list of nodes, the folders of what we keep, the browser's route."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import ComfyExtension, io

from . import calibrate, compare, load, plan, quantize, save, scale_lora, system_check, text_encoders, tune
from .calibrate import CALIBRATION_FOLDER
from .routes import add_routes
from .scale_lora import CORRECTIONS_FOLDER, SCALE_LORA_FOLDER

FAMILIES = (quantize, calibrate, plan, save, load, text_encoders, scale_lora, tune, compare, system_check)


class StepQuantExtension(ComfyExtension):
    async def on_load(self) -> None:
        for folder in (CALIBRATION_FOLDER, SCALE_LORA_FOLDER, CORRECTIONS_FOLDER):
            folder_paths.add_model_folder_path(folder, os.path.join(folder_paths.models_dir, folder), is_default=True)
        add_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for family in FAMILIES for node in family.NODES]
