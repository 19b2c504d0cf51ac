"""Quantize SDXL: a loaded MODEL in, a quantized MODEL out. The work is in hosts/comfy/quantize.py."""

from __future__ import annotations

import os
from dataclasses import replace

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..errors import CalibrationError
from ..hosts.acceleration import OPTIONS, TOOLTIP, Acceleration
from ..quant.activation_choice import MEASURED
from ..quant.layers import NEVER_QUANTIZED, find_layers
from ..quant.recipe import DEFAULT_GROUPS, PRESETS, Recipe, preset_recipe
from ..quant.saturation import DEFAULT_LIMIT
from ..quant.scheme import GRANULARITIES, MAX_CHANNEL_GROUPS
from .base_file import loaded_from
from .preview import show
from .report import model_report, with_report

CATEGORY = "StepQuant"
TOKEN, STATIC = PRESETS[:2]
CalibrationType = io.Custom("STEPQUANT_CALIBRATION")
RecipeType = io.Custom("STEPQUANT_RECIPE")
DEFAULT_CHANNEL_GROUPS = 8
DEFAULT_GRANULARITY = 64


def channel_group_inputs(default: int, tooltip: str) -> list[io.Input]:
    """Last and optional on their nodes: workflows saved before they existed stay valid."""
    return [
        io.Int.Input("channel_groups", default=default, min=1, max=MAX_CHANNEL_GROUPS, optional=True, advanced=True, tooltip=tooltip),
        io.Combo.Input(
            "granularity",
            options=[str(one) for one in GRANULARITIES],
            default=str(DEFAULT_GRANULARITY),
            optional=True,
            advanced=True,
            tooltip="Smallest size of a channel group, in channels. Groups of twice as many, at most 128, are taken unless these measure "
            "2 dB better: they cost far less time. Below 32 no fast kernel takes them. Usually 64.",
        ),
    ]


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
                    options=[*PRESETS, MEASURED],
                    default=TOKEN,
                    tooltip="How activations are scaled. w8a8-token (usual) measures every input while sampling and needs no calibration. "
                    "w8a8-static uses scales measured before, one set per group of timesteps, and needs a calibration. "
                    "w8a8-measured tries both and channel groups on the calibration, in minutes, and gives each layer the best. "
                    "w4a8-token is w8a8-token with 4-bit weights where layers can have them: for 4 GB cards, pictures differ more. "
                    "w4a8-mixed keeps 8 bits where 4 cost most: closer, 1 % larger. "
                    "w8a8-fp8 is w8a8-token with the layers after GEGLU in fp8, for datacentre cards from Hopper on (H100).",
                ),
                io.Int.Input(
                    "timestep_groups",
                    default=DEFAULT_GROUPS,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="For static scales: how many sets of them share the sampling schedule. "
                    "More follow the timesteps closer and need more calibration. Usually 8.",
                ),
                CalibrationType.Input(
                    "calibration",
                    optional=True,
                    tooltip="From Calibrate or Load calibration. Only w8a8-static and w8a8-measured need it; usually not connected.",
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
                *channel_group_inputs(
                    DEFAULT_CHANNEL_GROUPS,
                    "Only for w8a8-measured: into how many groups a layer's input channels may be sorted, each with a scale of its own, "
                    "so that a few large channels do not take the others' precision. 1 is none. Usually 8.",
                ),
                io.Float.Input(
                    "saturation_limit",
                    default=100 * DEFAULT_LIMIT,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="For static scales: a layer of which more than this many percent do not fit its calibrated range in a step "
                    "(a new LoRA, resolution or sampler) measures its input for the rest of the run. 100 never does. Usually 1.",
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
        channel_groups: int = DEFAULT_CHANNEL_GROUPS,
        granularity: str = str(DEFAULT_GRANULARITY),
        saturation_limit: float = 100 * DEFAULT_LIMIT,
    ) -> io.NodeOutput:
        from ..hosts.comfy.quantize import quantize_model

        if calibration is None and (preset in (STATIC, MEASURED) if recipe is None else recipe.needs_calibration):
            raise CalibrationError(
                f"{f'preset {preset}' if recipe is None else 'the plan'}: no calibration is connected; it needs one for its scales. "
                "Connect Calibrate (StepQuant), or choose w8a8-token."
            )
        path = loaded_from(model)
        recipe = recipe or _recipe(model, preset, calibration, timestep_groups, channel_groups, int(granularity))
        recipe = replace(recipe, saturation_limit=saturation_limit / 100)
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
        report = model_report(quantized, f"{recipe.preset} of {os.path.basename(path) if path else 'a model'}", summary.splitlines())
        return io.NodeOutput(quantized, summary, ui=with_report(show(cls, summary), report))


def _recipe(model, preset: str, calibration, timestep_groups: int, channel_groups: int, granularity: int) -> Recipe:
    from ..hosts.comfy.plan import measured_model_recipe

    if preset == MEASURED:
        bar = comfy.utils.ProgressBar(1)
        return measured_model_recipe(model, calibration, channel_groups, granularity, timestep_groups, bar.update_absolute)
    shapes = {name: tensor.shape for name, tensor in model.model.diffusion_model.state_dict().items()}
    return preset_recipe(preset, find_layers(shapes), timestep_groups)


def _summary(source, quantized, recipe) -> str:
    before, after = source.model_size(), quantized.model_size()
    kinds = ("is_fp8", "is_int4", "is_wide")
    in_fp8, in_int4, wide = (sum(getattr(scheme, kind) for scheme in recipe.schemes.values()) for kind in kinds)
    lines = [
        f"{recipe.preset}: {len(recipe.schemes)} layers in int8"
        + (f", {in_fp8} of them in fp8 instead" if in_fp8 else "")
        + (f", {in_int4} of them with 4-bit weights" if in_int4 else "")
        + (f", {wide} of them with 16-bit codes" if wide else ""),
        f"UNet {before / 2**20:.0f} MiB as it was loaded -> {after / 2**20:.0f} MiB ({100 * after / before:.0f} %)",
        f"kept in 16 bit: {', '.join(NEVER_QUANTIZED)}",
    ]
    if recipe.needs_calibration:
        lines.append(f"static scales in {len(set(recipe.groups))} timestep groups")
    grouped = [scheme.granularity for scheme in recipe.schemes.values() if scheme.is_grouped]
    if grouped:
        lines.append(f"{len(grouped)} layers in channel groups of {', '.join(map(str, sorted(set(grouped))))} channels")
    return "\n".join(lines)


NODES = [StepQuantQuantize]
