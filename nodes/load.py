"""Load quantized: lists and opens StepQuant's own files. The work is in hosts/comfy/loader.py."""

from __future__ import annotations

import logging
import os
from functools import lru_cache

import folder_paths
from comfy_api.latest import io

from ..errors import FormatError
from ..hosts.acceleration import OPTIONS, TOOLTIP, Acceleration
from ..quant.file_format import HEADER_KEY
from ..quant.safe_header import LARGEST_HEADER_BYTES, LENGTH_BYTES
from .file_names import file_state
from .preview import show
from .quantize import CATEGORY
from .report import model_report, with_report
from .shared_file import FOLDERS, PROPERTY, difference, find_file, identify, missing, remember, remembered

logger = logging.getLogger(__name__)


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
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file_name: str, acceleration: str = Acceleration.AUTO.value) -> str:
        return file_state(find_file(file_name))

    @classmethod
    def validate_inputs(cls, file_name: str) -> bool | str:
        return True if find_file(file_name) else missing(file_name)

    @classmethod
    def execute(cls, file_name: str, acceleration: str = Acceleration.AUTO.value) -> io.NodeOutput:
        from ..hosts.comfy.loader import load_quantized

        path = find_file(file_name)
        if path is None:  # the name came over a link, which ComfyUI does not validate
            raise FormatError(missing(file_name))
        loaded = load_quantized(path, embedding_directory=folder_paths.get_folder_paths("embeddings"), acceleration=acceleration)
        identity, warning = cls._recognise(file_name, path, loaded.header)
        parts = [name for name, part in (("CLIP", loaded.clip), ("VAE", loaded.vae)) if part is not None]
        contents = f"with {' and '.join(parts)}" if parts else "UNet only: connect CLIP and VAE from other loaders"
        lines = [f"{os.path.basename(file_name)}, {contents}", f"UNet {loaded.model.model_size() / 2**20:.0f} MiB"]
        lines += [warning] if warning else []
        report = model_report(loaded.model, lines[0], lines[1:])
        shown = with_report(show(cls, "\n".join(lines)), report)
        return io.NodeOutput(loaded.model, loaded.clip, loaded.vae, ui={**shown, PROPERTY: [identity]})

    @classmethod
    def _recognise(cls, file_name: str, path: str, header) -> tuple[dict[str, object], str | None]:
        """What the workflow is to remember of the file, and what to say if it remembers another one."""
        identity = identify(file_name, path, header)
        workflow, node_id = cls.hidden.extra_pnginfo, cls.hidden.unique_id
        known = remembered(workflow, node_id)
        warning = difference(known, identity)
        if warning:
            logger.warning("%s", warning)
            return known, warning  # until the artist chooses the file again, the workflow stays that of the other one
        remember(workflow, node_id, identity)
        return identity, None


def list_files() -> list[str]:
    """Names as `checkpoints/my-model.safetensors`, of files whose header is ours, damaged and newer ones included."""
    names = []
    for folder in FOLDERS:
        for name in folder_paths.get_filename_list(folder):
            path = folder_paths.get_full_path(folder, name)
            if name.endswith(".safetensors") and path is not None and is_ours(path, file_state(path)):
                names.append(f"{folder}/{name}")
    return names


@lru_cache(maxsize=4096)
def is_ours(path: str, _state: str, key: str = HEADER_KEY) -> bool:
    """Whether the safetensors header has our key. ComfyUI lists nodes often: a file is looked at once, until it changes."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            return length <= LARGEST_HEADER_BYTES and f'"{key}":'.encode() in file.read(length)
    except OSError:
        return False


NODES = [StepQuantLoad]
