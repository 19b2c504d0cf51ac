"""Plans a recipe for a loaded MODEL from a calibration of it. The plan itself is made in quant/plan.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.model_patcher import ModelPatcher

from ...quant.calibration import Calibration
from ...quant.grouping import choose_groups
from ...quant.plan import Plan, make_plan, measure_options, unquantized_bytes
from ...quant.plan_program import Budget
from ...quant.recipe import preset_recipe
from .quantize import quantizable_layers, weight_reader


def plan_model(
    model: ModelPatcher,
    calibration: Calibration,
    grouping: str,
    groups: int,
    budget: Budget,
    protected: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """The best recipe for `model` within the budget, with its frontier; `model` is only read.

    Args:
        calibration: of this model, with sensitivities.
        grouping, groups: how static scales follow the timestep (quant/grouping.py). protected: names or patterns.
        progress: called with (layers done, layers in all), over grouping and measuring.
    Raises: ModelError if `model` is no SDXL or quantized already; CalibrationError if a layer was not observed or probed;
        PlanError if nothing fits.
    """
    layers = quantizable_layers(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.model.diffusion_model.state_dict().items()}

    def report(offset: int) -> Callable[[int, int], None]:
        def after_layer(done: int, _total: int) -> None:
            throw_exception_if_processing_interrupted()
            if progress is not None:
                progress(offset + done, 2 * len(layers))

        return after_layer

    static = preset_recipe("w8a8-static", layers).schemes
    chosen = choose_groups(grouping, groups, calibration, static, progress=report(0))
    options = measure_options(layers, weight_reader(model), calibration, chosen, protected, progress=report(len(layers)))
    return make_plan(options, budget, chosen, unquantized_bytes(shapes, layers), with_frontier=True)
