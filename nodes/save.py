"""Save quantized and Export native: one file, for Load quantized or for anyone's ComfyUI. The work is in hosts/comfy/."""

from __future__ import annotations

import os
from collections.abc import Callable

import folder_paths
from comfy_api.latest import io

from ..errors import FormatError
from .base_file import made_from, sha256
from .file_names import checked_name
from .preview import show
from .quantize import CATEGORY


class StepQuantSave(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StepQuantSave",
            display_name="Save quantized (StepQuant)",
            category=CATEGORY,
            description="Writes the quantized model to one file for Load quantized. The file appears whole or not at all.",
            search_aliases=["save model", "export int8", "write checkpoint"],
            inputs=_inputs("sdxl-w8a8"),
            outputs=[io.String.Output("path", display_name="path", tooltip="The file that was written.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, file_name: str, overwrite: bool = False, clip=None, vae=None) -> io.NodeOutput:
        from ..hosts.comfy.save import save_quantized

        def write(path: str):
            return save_quantized(model, path, clip=clip, vae=vae, base_model=_base_model(model))

        return _written(cls, write, file_name, overwrite, whole=clip is not None or vae is not None)


class StepQuantExportNative(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StepQuantExportNative",
            display_name="Export native (StepQuant)",
            category=CATEGORY,
            description="Writes the quantized model as a file that ComfyUI opens without StepQuant: Linears in ComfyUI's own int8, "
            "convolutions in 16 bit. Larger and slower than Save quantized; for people who do not have this pack.",
            search_aliases=["save int8", "share model", "stock format", "without StepQuant"],
            inputs=_inputs("sdxl-native-int8"),
            outputs=[io.String.Output("path", display_name="path", tooltip="The file that was written.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, file_name: str, overwrite: bool = False, clip=None, vae=None) -> io.NodeOutput:
        from ..hosts.comfy.export_native import export_native

        def write(path: str):
            return export_native(model, path, clip=clip, vae=vae)

        whole = clip is not None or vae is not None
        opened_by = "Load Checkpoint" if whole else "Load Diffusion Model"
        return _written(cls, write, file_name, overwrite, whole, f"opens in ComfyUI's own {opened_by}")


def _inputs(name: str) -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="From Quantize SDXL or Load quantized (StepQuant)."),
        io.String.Input(
            "file_name",
            default=name,
            tooltip="Name of the file; the extension is added. With a subfolder if you like, such as quantized/my-model.",
        ),
        io.Boolean.Input(
            "overwrite",
            default=False,
            tooltip="Replace a file of this name. Usually off: then an existing file is kept and the node says so.",
        ),
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="With CLIP and VAE connected the file is a whole checkpoint, in models/checkpoints. "
            "Without, it holds the UNet alone, in models/diffusion_models.",
        ),
        io.Vae.Input("vae", optional=True, tooltip="See clip. Usually both or neither are connected."),
    ]


def _written(node: type[io.ComfyNode], write: Callable, file_name: str, overwrite: bool, whole: bool, note: str = "") -> io.NodeOutput:
    """Write under a checked name and say what was written."""
    path = checked_name(file_name, _folder(whole))
    if os.path.exists(path) and not overwrite:
        raise FormatError(f"{path}: exists already. Choose another file name, or switch overwrite on.")
    saved = write(path)
    lines = [f"saved {path}", f"{saved.size_bytes / 2**20:.0f} MiB", *([note] if note else [])]
    if saved.patches_left_out:
        lines.append(f"without the LoRA on {saved.patches_left_out} weights: apply it again after loading")
    return io.NodeOutput(path, ui=show(node, "\n".join(lines)))


def _base_model(model) -> dict[str, str | None] | None:
    """Name and SHA-256 of the file that was quantized; None, which keeps what the model itself knows, if there is none."""
    from ..hosts.comfy.attach import state_of

    state, path = state_of(model), made_from(model)
    return None if state is None or path is None else {**state.base_model, "sha256": sha256(path)}


def _folder(whole: bool) -> str:
    """models/diffusion_models rather than its older twin models/unet, which ComfyUI lists first."""
    paths = folder_paths.get_folder_paths("checkpoints" if whole else "diffusion_models")
    return next((path for path in paths if os.path.basename(path) == "diffusion_models"), paths[0])


NODES = [StepQuantSave, StepQuantExportNative]
