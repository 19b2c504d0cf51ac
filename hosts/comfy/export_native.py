"""Writes a quantized MODEL as a file that ComfyUI opens without StepQuant. The format is quant/native_format.py's."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
from comfy.model_patcher import ModelPatcher

from ...quant.native_format import write_native
from .save import SavedFile, describe_written, stored_model


def export_native(model: ModelPatcher, path: str | Path, clip: comfy.sd.CLIP | None = None, vae: comfy.sd.VAE | None = None) -> SavedFile:
    """Write the model for stock loaders: Linears in ComfyUI's own int8, convolutions in fp16; whole or not at all.

    As with save_quantized, LoRAs that were put on after quantizing are not in the file.
    Raises: ModelError if the model is not a quantized one; FormatError if the file cannot be written.
    """
    write_native(path, stored_model(model, clip, vae))
    return describe_written(model, path)
