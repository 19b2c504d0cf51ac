"""What ComfyUI asks the pack for: the list of nodes, the folder that calibrations are kept in, the browser's route."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import ComfyExtension, io

from . import calibrate, compare, load, plan, quantize, save, system_check
from .calibrate import CALIBRATION_FOLDER
from .routes import add_routes

FAMILIES = (quantize, calibrate, plan, save, load, compare, system_check)


class StepQuantExtension(ComfyExtension):
    async def on_load(self) -> None:
        default = os.path.join(folder_paths.models_dir, CALIBRATION_FOLDER)
        folder_paths.add_model_folder_path(CALIBRATION_FOLDER, default, is_default=True)
        add_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for family in FAMILIES for node in family.NODES]
