"""Load quantized: lists and opens StepQuant's own files. The work is in hosts/comfy/loader.py."""

from __future__ import annotations

import os
from functools import lru_cache

import folder_paths
from comfy_api.latest import io

from ..errors import FormatError
from ..hosts.acceleration import OPTIONS, TOOLTIP, Acceleration
from ..quant.file_format import HEADER_KEY
from .file_names import file_state
from .preview import show
from .quantize import CATEGORY

FOLDERS = ("diffusion_models", "checkpoints")
# safetensors' own limit for the JSON at the start of a file.
LARGEST_HEADER = 100_000_000


class StepQuantLoad(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StepQuantLoad",
            display_name="Load quantized (StepQuant)",
            category=CATEGORY,
            description="Opens a file made by Save quantized. Stock loaders refuse such files.",
            search_aliases=["load checkpoint", "load int8", "open quantized model", "unet loader"],
            inputs=[
                io.Combo.Input(
                    "file_name",
                    options=list_files(),
                    tooltip="Files in models/checkpoints and models/diffusion_models that StepQuant made. Press R to see new ones.",
                ),
                # Last and optional: workflows saved before it existed stay valid.
                io.Combo.Input(
                    "acceleration", options=OPTIONS, default=Acceleration.AUTO.value, optional=True, advanced=True, tooltip=TOOLTIP
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The int8 model, for KSampler, LoRA loaders and every other node that takes a MODEL."),
                io.Clip.Output("clip", tooltip="The text encoders, if the file is a whole checkpoint; otherwise load them by themselves."),
                io.Vae.Output("vae", tooltip="The VAE, if the file is a whole checkpoint; otherwise load it by itself."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file_name: str, acceleration: str = Acceleration.AUTO.value) -> str:
        return file_state(_find(file_name))

    @classmethod
    def validate_inputs(cls, file_name: str) -> bool | str:
        return True if _find(file_name) else _not_found(file_name)

    @classmethod
    def execute(cls, file_name: str, acceleration: str = Acceleration.AUTO.value) -> io.NodeOutput:
        from ..hosts.comfy.loader import load_quantized

        path = _find(file_name)
        if path is None:  # the name came over a link, which ComfyUI does not validate
            raise FormatError(_not_found(file_name))
        loaded = load_quantized(path, embedding_directory=folder_paths.get_folder_paths("embeddings"), acceleration=acceleration)
        parts = [name for name, part in (("CLIP", loaded.clip), ("VAE", loaded.vae)) if part is not None]
        contents = f"with {' and '.join(parts)}" if parts else "UNet only: connect CLIP and VAE from other loaders"
        text = f"{os.path.basename(file_name)}, {contents}\nUNet {loaded.model.model_size() / 2**20:.0f} MiB"
        return io.NodeOutput(loaded.model, loaded.clip, loaded.vae, ui=show(cls, text))


def list_files() -> list[str]:
    """Names as `checkpoints/my-model.safetensors`, of files whose header is ours, damaged and newer ones included."""
    names = []
    for folder in FOLDERS:
        for name in folder_paths.get_filename_list(folder):
            path = folder_paths.get_full_path(folder, name)
            if name.endswith(".safetensors") and path is not None and _is_ours(path, file_state(path)):
                names.append(f"{folder}/{name}")
    return names


def _find(file_name: str) -> str | None:
    folder, _, name = file_name.replace("\\", "/").partition("/")
    if folder not in FOLDERS or not name:
        return None
    return folder_paths.get_full_path(folder, name)


def _not_found(file_name: str) -> str:
    return f"{file_name}: no such file in models/checkpoints or models/diffusion_models. Put it there, or press R and choose another one."


@lru_cache(maxsize=4096)
def _is_ours(path: str, _state: str) -> bool:
    """Whether the safetensors header names StepQuant. ComfyUI lists nodes often: a file is looked at once, until it changes."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return length <= LARGEST_HEADER and f'"{HEADER_KEY}":'.encode() in file.read(length)
    except OSError:
        return False


NODES = [StepQuantLoad]
