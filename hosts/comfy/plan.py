"""Makes a recipe for a loaded MODEL from a calibration of it. How: quant/plan.py, or quant/activation_choice.py layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...quant.activation_choice import measured_recipe
from ...quant.calibration import Calibration
from ...quant.grouping import choose_groups
from ...quant.plan import Plan, make_plan, measure_options, unquantized_bytes
from ...quant.plan_program import Budget
from ...quant.recipe import Recipe, preset_recipe
from ...quant.rounding.method import Rounding
from .quantize import quantizable_layers, weight_reader


def plan_model(
    model: ModelPatcher,
    calibration: Calibration,
    grouping: str,
    groups: int,
    budget: Budget,
    protected: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    channel_groups: int = 1,
    granularity: int = 64,
    four_bits: bool = False,
) -> Plan:
    """The best recipe for `model` within the budget, with its frontier; `model` is only read.

    Args:
        calibration: of this model, with sensitivities.
        grouping, groups: how static scales follow the timestep (quant/grouping.py). protected: names or patterns.
        progress: called with (layers done, layers in all), over grouping and measuring.
        channel_groups: more than 1 also offers every layer so many groups of input channels, where it has enough of them.
        granularity: channels per block of a group. four_bits: also offers 4-bit weights, rounded plainly as Quantize does.
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
    measured = (layers, weight_reader(model), calibration, chosen, protected, channel_groups, granularity)
    options = measure_options(*measured, progress=report(len(layers)), rounding=Rounding() if four_bits else None)
    return make_plan(options, budget, chosen, unquantized_bytes(shapes, layers), with_frontier=True)


def measured_model_recipe(
    model: ModelPatcher,
    calibration: Calibration,
    channel_groups: int,
    granularity: int,
    timestep_groups: int,
    progress: Callable[[int, int], None] | None = None,
) -> Recipe:
    """Every layer's activations token, static or in channel groups, whichever measured the highest SQNR; `model` is only read.

    Args:
        channel_groups, granularity: at most so many groups a layer, of blocks of so many channels.
        progress: called with (layers done, layers in all).
    Raises: ModelError if `model` is no SDXL or quantized already; CalibrationError if a layer was not observed.
    """
    layers, read, done = quantizable_layers(model), weight_reader(model), 0

    def weight_of(name: str) -> Tensor:
        nonlocal done
        throw_exception_if_processing_interrupted()
        done += 1
        if progress is not None:
            progress(done, len(layers))
        return read(name)

    return measured_recipe(calibration, weight_of, layers, channel_groups, granularity, timestep_groups)[0]
