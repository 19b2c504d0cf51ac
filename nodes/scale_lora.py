"""Load scale LoRA, and Apply corrections: small files beside a quantized MODEL. The work is in hosts/comfy/."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import io

from ..quant.corrections.correction_file import METHODS
from .file_names import file_state
from .preview import show
from .quantize import CATEGORY

SCALE_LORA_FOLDER = "stepquant_scale_loras"
CORRECTIONS_FOLDER = "stepquant_corrections"
AUTO = "auto"


class StepQuantLoadScaleLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StepQuantLoadScaleLora",
            display_name="Load scale LoRA (StepQuant)",
            category=CATEGORY,
            description="Gives a quantized model the scales that were tuned for a subject, a style, or to repair it. Weights stay.",
            search_aliases=["TuneQDM", "personalisation", "fine tuning", "scale tuning", "lora"],
            inputs=[
                io.Model.Input("model", tooltip="The quantized model that the file was tuned on, from Quantize SDXL or Load quantized."),
                io.Combo.Input(
                    "file_name",
                    options=_saved(SCALE_LORA_FOLDER),
                    tooltip=f"Files in models/{SCALE_LORA_FOLDER}, made by Tune scales. Press R to see new ones.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How far the scales move: 0 not at all, 1 as tuned. Usually 1; 0.5 to 1 where several are stacked.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The quantized model with the tuned scales; more of these nodes may follow.")],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file_name: str, strength: float = 1.0, **_: object) -> str:
        return f"{file_state(folder_paths.get_full_path(SCALE_LORA_FOLDER, file_name))} {strength}"

    @classmethod
    def validate_inputs(cls, file_name: str) -> bool | str:
        return _is_there(SCALE_LORA_FOLDER, file_name, "Make one with Tune scales")

    @classmethod
    def execute(cls, model, file_name: str, strength: float = 1.0) -> io.NodeOutput:
        from ..hosts.comfy.scale_lora import stack_of, with_scale_lora
        from ..quant.tuning.scale_file import load_scale_set

        path = folder_paths.get_full_path_or_raise(SCALE_LORA_FOLDER, file_name)
        scales = load_scale_set(path)
        tuned = with_scale_lora(model, scales, strength, os.path.basename(file_name))
        experts = "one set" if scales.experts == 1 else f"{scales.experts} sets along the schedule"
        lines = [f"{scales.values} scales in {experts}, {os.path.getsize(path) / 1e6:.2f} MB, strength {strength:g}"]
        if len(stack_of(tuned)) > 1:
            lines.append(f"{len(stack_of(tuned))} scale LoRAs are stacked")
        return io.NodeOutput(tuned, ui=show(cls, "\n".join(lines)))


class StepQuantCorrections(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StepQuantCorrections",
            display_name="Apply corrections (StepQuant)",
            category=CATEGORY,
            description="Takes the mean error off a quantized model's noise estimate, if that helped on prompts it was not fitted on.",
            search_aliases=["PTQD", "TAC-Diffusion", "noise correction", "bias correction"],
            inputs=[
                io.Model.Input("model", tooltip="The quantized model that the corrections were measured on."),
                io.Combo.Input(
                    "file_name",
                    options=_saved(CORRECTIONS_FOLDER),
                    tooltip=f"Files in models/{CORRECTIONS_FOLDER}, made by the command corrections. Press R to see new ones.",
                ),
                io.Combo.Input(
                    "method",
                    options=[AUTO, *METHODS],
                    default=AUTO,
                    tooltip="auto (usual): the one that helped most on held-out prompts, or none. The others are used in any case.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with the correction, or as it was if none helps."),
                io.String.Output("report", display_name="report", tooltip="What each method did on held-out prompts, and which is used."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file_name: str, method: str = AUTO, **_: object) -> str:
        return f"{file_state(folder_paths.get_full_path(CORRECTIONS_FOLDER, file_name))} {method}"

    @classmethod
    def validate_inputs(cls, file_name: str) -> bool | str:
        return _is_there(CORRECTIONS_FOLDER, file_name, "Make one with the command corrections")

    @classmethod
    def execute(cls, model, file_name: str, method: str = AUTO) -> io.NodeOutput:
        from ..hosts.comfy.corrections import with_corrections
        from ..quant.corrections.correction_file import load_corrections

        corrections = load_corrections(folder_paths.get_full_path_or_raise(CORRECTIONS_FOLDER, file_name))
        corrected, chosen = with_corrections(model, corrections, method, os.path.basename(file_name))
        report = "\n".join([f"in use: {chosen or 'none, as none helped'}", *corrections.lines()])
        return io.NodeOutput(corrected, report, ui=show(cls, report))


def _saved(folder: str) -> list[str]:
    return [name for name in folder_paths.get_filename_list(folder) if name.endswith(".safetensors")]


def _is_there(folder: str, file_name: str, make: str) -> bool | str:
    if folder_paths.get_full_path(folder, file_name) is None:
        return f"{file_name}: not in models/{folder}. {make}, or refresh and choose again."
    return True


NODES = [StepQuantLoadScaleLora, StepQuantCorrections]
