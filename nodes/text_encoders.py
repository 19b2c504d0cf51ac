"""Save text encoders and Load text encoders: SDXL's CLIP in 8 bit. The work is in hosts/comfy/text_encoders.py."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import io

from ..errors import FormatError
from ..quant.text_encoder import HEADER_KEY
from .file_names import checked_name, file_state
from .load import is_ours
from .preview import show
from .quantize import CATEGORY

FOLDER = "text_encoders"


class StepQuantSaveTextEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StepQuantSaveTextEncoders",
            display_name="Save text encoders in 8 bit (StepQuant)",
            category=CATEGORY,
            description="Writes SDXL's two text encoders with 8-bit weights to one file for Load text encoders: 0.86 GiB instead of 1.52.",
            search_aliases=["clip int8", "quantize clip", "save clip", "text encoder int8"],
            inputs=[
                io.Clip.Input("clip", tooltip="SDXL's CLIP, from Load Checkpoint or DualCLIPLoader. LoRAs on it are in the file."),
                io.String.Input(
                    "file_name", default="sdxl-clip-int8", tooltip="Name of the file in models/text_encoders; the extension is added."
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replace a file of this name. Usually off: then an existing file is kept and the node says so.",
                ),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="The file that was written.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, clip, file_name: str, overwrite: bool = False) -> io.NodeOutput:
        from ..hosts.comfy.text_encoders import save_text_encoders

        folders = folder_paths.get_folder_paths(FOLDER)
        # ComfyUI lists its older twin models/clip too.
        path = checked_name(file_name, next((path for path in folders if os.path.basename(path) == FOLDER), folders[0]))
        if os.path.exists(path) and not overwrite:
            raise FormatError(f"{path}: exists already. Choose another file name, or switch overwrite on.")
        size = save_text_encoders(clip, path)
        return io.NodeOutput(path, ui=show(cls, f"saved {path}\n{size / 2**20:.0f} MiB"))


class StepQuantLoadTextEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StepQuantLoadTextEncoders",
            display_name="Load text encoders (StepQuant)",
            category=CATEGORY,
            description="Opens a file made by Save text encoders in 8 bit: SDXL's CLIP in half the memory. Stock loaders cannot open it.",
            search_aliases=["clip loader", "dual clip loader", "clip int8", "text encoder int8"],
            inputs=[
                io.Combo.Input(
                    "file_name",
                    options=list_files(),
                    tooltip="Files in models/text_encoders that Save text encoders made. Press R to see new ones.",
                )
            ],
            outputs=[io.Clip.Output("clip", tooltip="SDXL's CLIP, for CLIP Text Encode, LoRA loaders and other nodes that take one.")],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file_name: str) -> str:
        return file_state(folder_paths.get_full_path(FOLDER, file_name))

    @classmethod
    def validate_inputs(cls, file_name: str) -> bool | str:
        if folder_paths.get_full_path(FOLDER, file_name) is None:
            return f"{file_name}: not in models/{FOLDER}. Make one with Save text encoders, or refresh and choose again."
        return True

    @classmethod
    def execute(cls, file_name: str) -> io.NodeOutput:
        from ..hosts.comfy.text_encoders import load_text_encoders

        path = folder_paths.get_full_path_or_raise(FOLDER, file_name)
        clip = load_text_encoders(path, embedding_directory=folder_paths.get_folder_paths("embeddings"))
        return io.NodeOutput(clip, ui=show(cls, f"{os.path.basename(file_name)}, {clip.patcher.model_size() / 2**20:.0f} MiB"))


def list_files() -> list[str]:
    """Names in models/text_encoders whose header is ours."""
    paths = {name: folder_paths.get_full_path(FOLDER, name) for name in folder_paths.get_filename_list(FOLDER)}
    return [name for name, path in paths.items() if path is not None and is_ours(path, file_state(path), HEADER_KEY)]


NODES = [StepQuantSaveTextEncoders, StepQuantLoadTextEncoders]
