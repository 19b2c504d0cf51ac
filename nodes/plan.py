"""Plan: a calibration and a budget in, a recipe for every layer out, with its pictures. The work is in quant/plan.py."""

from __future__ import annotations

import comfy.utils
from comfy_api.latest import io

from ..quant.grouping import GroupingMethod
from ..quant.plan_program import INTEGER_SHARE, Budget
from ..quant.recipe import DEFAULT_GROUPS
from .preview import show, to_tensor
from .quantize import CATEGORY, DEFAULT_GRANULARITY, CalibrationType, RecipeType, channel_group_inputs

MEGABYTE = 1_000_000


class StepQuantPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StepQuantPlan",
            display_name="Plan (StepQuant)",
            category=CATEGORY,
            description="Chooses a number format for every layer: the best predicted quality in your limits. Shows what makes the noise.",
            search_aliases=["mixed precision", "sensitivity", "recipe", "budget", "bit allocation", "SQNR"],
            inputs=[
                io.Model.Input("model", tooltip="The 16-bit SDXL model that was calibrated, as connected to Quantize SDXL."),
                CalibrationType.Input(
                    "calibration", tooltip="From Calibrate or Load calibration, of this model and made with sensitivity switched on."
                ),
                io.Float.Input(
                    "integer_share",
                    default=100 * INTEGER_SHARE,
                    min=0.0,
                    max=100.0,
                    step=1.0,
                    tooltip="At least this many percent of the multiply-adds run as integers; the rest may stay 16 bit where it helps. "
                    "Lower is slower and finer. Usually 98.",
                ),
                io.Float.Input(
                    "max_size_mb",
                    default=0.0,
                    min=0.0,
                    max=100_000.0,
                    step=10.0,
                    tooltip="Largest UNet file, in MB (millions of bytes). Usually 0: no limit. SDXL in int8 needs about 2600.",
                ),
                io.Float.Input(
                    "max_vram_mb",
                    default=0.0,
                    min=0.0,
                    max=100_000.0,
                    step=10.0,
                    advanced=True,
                    tooltip="Most memory for the UNet's weights while sampling, in MB; pictures in the making come on top. "
                    "Usually 0: no limit.",
                ),
                io.Float.Input(
                    "min_sqnr_db",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip="If not 0, the fastest plan whose predicted SQNR reaches this, with 16-bit codes (two products each) in layers "
                    "that need them; else the best that fits. Usually 0, or 35.",
                ),
                io.Combo.Input(
                    "grouping",
                    options=[method.value for method in GroupingMethod],
                    default=GroupingMethod.OPTIMAL.value,
                    tooltip="How static scales follow the timestep. optimal (usual) cuts the schedule where each layer loses least; "
                    "uniform in equal parts; search as the paper ADP-DM learns it, in minutes; curve gives every timestep its own.",
                ),
                io.Int.Input(
                    "timestep_groups",
                    default=DEFAULT_GROUPS,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Sets of static scales along the schedule, or numbers that draw the curve. Usually 8.",
                ),
                io.String.Input(
                    "protect",
                    default="",
                    multiline=True,
                    advanced=True,
                    tooltip="Layers that stay 16 bit whatever it costs, one name a line; * is any part, as in *.ff.net.2. Usually empty.",
                ),
                *channel_group_inputs(
                    1,
                    "More than 1 offers every layer that many channel groups too: its input channels sorted by size, each group with a "
                    "scale of its own. Finer, a little slower, and takes minutes to try. Usually 1 (none), or 8.",
                ),
                io.Boolean.Input(
                    "four_bits",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Also offers 4-bit weights, for files smaller than int8's: set max_size_mb too, 1540 for a 4 GB card. "
                    "Usually off.",
                ),
            ],
            outputs=[
                RecipeType.Output("recipe", display_name="recipe", tooltip="For Quantize SDXL, together with the same calibration."),
                io.Image.Output("map", display_name="sensitivity map", tooltip="Which layers make the noise, and what each was given."),
                io.Image.Output("frontier", display_name="size and quality", tooltip="The best plans of all sizes, and the chosen one."),
                io.Image.Output("sqnr", display_name="SQNR over t", tooltip="Predicted SQNR along the schedule."),
                io.Image.Output("scales", display_name="scales over t", tooltip="How static scales follow the timestep, by kind of layer."),
                io.String.Output("report", display_name="report", tooltip="What was chosen and what is predicted, as text."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        calibration,
        integer_share: float = 100 * INTEGER_SHARE,
        max_size_mb: float = 0.0,
        max_vram_mb: float = 0.0,
        min_sqnr_db: float = 0.0,
        grouping: str = GroupingMethod.OPTIMAL.value,
        timestep_groups: int = DEFAULT_GROUPS,
        protect: str = "",
        channel_groups: int = 1,
        granularity: str = str(DEFAULT_GRANULARITY),
        four_bits: bool = False,
    ) -> io.NodeOutput:
        from ..hosts.comfy.plan import plan_model
        from .plan_plots import plan_pictures

        budget = Budget(
            size_bytes=round(max_size_mb * MEGABYTE) or None,
            vram_bytes=round(max_vram_mb * MEGABYTE) or None,
            sqnr_db=min_sqnr_db or None,
            integer_share=integer_share / 100,
        )
        protected = [line.strip() for line in protect.splitlines() if line.strip()]
        bar = comfy.utils.ProgressBar(1)
        groups = {"channel_groups": channel_groups, "granularity": int(granularity), "four_bits": four_bits}
        plan = plan_model(model, calibration, grouping, timestep_groups, budget, protected, bar.update_absolute, **groups)
        pictures = [to_tensor(picture) for picture in plan_pictures(plan, calibration)]
        report = "\n".join(plan.lines())
        return io.NodeOutput(plan.recipe, *pictures, report, ui=show(cls, report, pictures))


NODES = [StepQuantPlan]
