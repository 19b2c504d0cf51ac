"""Quantize SDXL: a loaded MODEL in, a quantized MODEL out. The work is in hosts/comfy/quantize.py."""

from __future__ import annotations

import os

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..errors import CalibrationError
from ..hosts.acceleration import OPTIONS, TOOLTIP, Acceleration
from ..quant.layers import NEVER_QUANTIZED, find_layers
from ..quant.recipe import DEFAULT_GROUPS, PRESETS, preset_recipe
from .base_file import loaded_from
from .preview import show

CATEGORY = "StepQuant"
TOKEN, STATIC = PRESETS
CalibrationType = io.Custom("STEPQUANT_CALIBRATION")
RecipeType = io.Custom("STEPQUANT_RECIPE")


class StepQuantQuantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StepQuantQuantize",
            display_name="Quantize SDXL (StepQuant)",
            category=CATEGORY,
            description="Makes an int8 copy of an SDXL model: half the memory, convolutions included. The incoming model is untouched.",
            search_aliases=["int8", "w8a8", "quantise", "compress model", "low vram", "smaller model"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="An SDXL model in 16 bit, with its LoRAs and patches. Connect the output of Load Checkpoint here."
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=TOKEN,
                    tooltip="How activations are scaled. w8a8-token (usual) measures every input while sampling and needs no calibration. "
                    "w8a8-static uses scales measured before, one set per group of timesteps, and needs a calibration.",
                ),
                io.Int.Input(
                    "timestep_groups",
                    default=DEFAULT_GROUPS,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Only for w8a8-static: how many sets of scales share the sampling schedule. "
                    "More follow the timesteps closer and need more calibration. Usually 8.",
                ),
                CalibrationType.Input(
                    "calibration",
                    optional=True,
                    tooltip="From Calibrate or Load calibration. w8a8-static needs it; w8a8-token works without, which is the usual case.",
                ),
                # Last and optional: workflows saved before it existed stay valid.
                io.Combo.Input(
                    "acceleration", options=OPTIONS, default=Acceleration.AUTO.value, optional=True, advanced=True, tooltip=TOOLTIP
                ),
                RecipeType.Input(
                    "recipe",
                    optional=True,
                    tooltip="From Plan. If connected, it decides for every layer, and preset and timestep_groups are not used. "
                    "Usually not connected.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The int8 model, for KSampler, LoRA loaders and every other node that takes a MODEL."),
                io.String.Output("summary", display_name="summary", tooltip="What was quantized and how large it is now."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        preset: str,
        timestep_groups: int = DEFAULT_GROUPS,
        calibration=None,
        acceleration: str = Acceleration.AUTO.value,
        recipe=None,
    ) -> io.NodeOutput:
        from ..hosts.comfy.quantize import quantize_model

        if calibration is None and (preset == STATIC if recipe is None else recipe.needs_calibration):
            raise CalibrationError(
                f"{f'preset {preset}' if recipe is None else 'the plan'}: no calibration is connected; it needs one for its scales. "
                "Connect Calibrate (StepQuant), or choose w8a8-token."
            )
        path = loaded_from(model)
        shapes = {name: tensor.shape for name, tensor in model.model.diffusion_model.state_dict().items()}
        recipe = recipe or preset_recipe(preset, find_layers(shapes), timestep_groups)
        bar = comfy.utils.ProgressBar(len(recipe.schemes))
        quantized = quantize_model(
            model,
            recipe,
            calibration if recipe.needs_calibration else None,
            progress=bar.update_absolute,
            check_interrupt=comfy.model_management.throw_exception_if_processing_interrupted,
            base_model={"name": os.path.basename(path) if path else None, "sha256": None},
            acceleration=acceleration,
        )
        summary = _summary(model, quantized, recipe)
        return io.NodeOutput(quantized, summary, ui=show(cls, summary))


def _summary(source, quantized, recipe) -> str:
    before, after = source.model_size(), quantized.model_size()
    lines = [
        f"{recipe.preset}: {len(recipe.schemes)} layers in int8",
        f"UNet {before / 2**20:.0f} MiB -> {after / 2**20:.0f} MiB ({100 * after / before:.0f} %)",
        f"kept in 16 bit: {', '.join(NEVER_QUANTIZED)}",
    ]
    if recipe.needs_calibration:
        lines.append(f"static scales in {len(set(recipe.groups))} timestep groups")
    return "\n".join(lines)


NODES = [StepQuantQuantize]
