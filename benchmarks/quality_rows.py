"""The rows of the quality table: plain min-max, each method added to it alone, all of them, ComfyUI's own formats, presets, the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from quality_int4_rows import INT4_MODES, int4_plans
from quality_layers import LayerPlan
from torch import Tensor

from stepquant.quant.activation_choice import choose_activation
from stepquant.quant.calibration import Calibration
from stepquant.quant.grouping import Grouping, choose_groups
from stepquant.quant.layers import LayerSpec, has_symmetric_input, needs_row_scales
from stepquant.quant.recipe import DEFAULT_GROUPS, FP8_PRESET, Recipe, preset_recipe
from stepquant.quant.scheme import ActivationMode, Scheme

# As fine relative to the demo model's 64 to 512 channels as 64 is to SDXL's 320 to 5120.
GRANULARITY, CHANNEL_GROUPS = 8, 16

WeightOf = Callable[[str], Tensor]  # a layer's float weight by name, on the CPU
Known = dict[tuple, object]  # groupings and plans by what they depend on: they take seconds, and several rows share them


@dataclass(frozen=True)
class Row:
    """mode: the record's name. log2_attention: maps in so many bits, 0 for the engine's own attention."""

    mode: str
    plans: Mapping[str, LayerPlan]
    bits: int = 8
    log2_attention: int = 0


@dataclass(frozen=True)
class Method:
    """What is added to plain min-max W8A8: everything off is one symmetric scale per tensor, weights too, for all timesteps.

    grouping: how timesteps are grouped, None for one group. row_scales: layers that need them (layers.needs_row_scales) keep one
    scale per row. min_max: ranges hold everything seen; else a little may be clipped.
    measured: a layer has channel groups only where they were measured to be better on the recorded rows, and coarse ones if those do.
    """

    per_channel_weight: bool = False
    asymmetric: bool = False
    grouping: str | None = None
    token: bool = False
    channel_groups: int = 1
    row_scales: bool = False
    min_max: bool = True
    log2_attention: bool = False
    measured: bool = False

    def plans(
        self, layers: Mapping[str, LayerSpec], calibration: Calibration, known: Known, weight_of: WeightOf, bits: int = 8
    ) -> dict[str, LayerPlan]:
        key = (replace(self, log2_attention=False), bits)
        if key not in known:
            known[key] = self._plans(layers, calibration, known, weight_of, bits)
        return known[key]

    def _plans(
        self, layers: Mapping[str, LayerSpec], calibration: Calibration, known: Known, weight_of: WeightOf, bits: int
    ) -> dict[str, LayerPlan]:
        schemes = {name: self._scheme(spec) for name, spec in layers.items()}
        groups = self._groups(calibration, schemes, known)
        if self.measured:
            for name, scheme in schemes.items():
                if scheme.is_grouped:
                    statistics, its_groups = calibration.layers[name], groups.layer_groups.get(name, groups.groups)
                    options = (self.channel_groups, GRANULARITY, bits, (ActivationMode.STATIC,))
                    schemes[name] = choose_activation(name, statistics, weight_of(name), its_groups, *options).scheme
        return {
            name: LayerPlan(scheme, groups.layer_groups.get(name, groups.groups), not self.per_channel_weight, self.min_max)
            for name, scheme in schemes.items()
        }

    def _scheme(self, spec: LayerSpec) -> Scheme:
        if self.token or (self.row_scales and needs_row_scales(spec.name)):
            return Scheme()
        symmetric = not self.asymmetric or has_symmetric_input(spec.name)
        groups = min(self.channel_groups, spec.in_channels // GRANULARITY)
        if groups > 1:
            return Scheme(activation=ActivationMode.CHANNEL_GROUP, symmetric=symmetric, channel_groups=groups, granularity=GRANULARITY)
        return Scheme(activation=ActivationMode.STATIC, symmetric=symmetric)

    def _groups(self, calibration: Calibration, schemes: Mapping[str, Scheme], known: Known) -> Grouping:
        # Which layers are static and which of them symmetric is all that the choice depends on.
        key = (self.grouping, self.asymmetric, self.row_scales)
        if key not in known:
            count = 1 if self.grouping is None else DEFAULT_GROUPS
            known[key] = choose_groups(self.grouping or "uniform", count, calibration, schemes)
        return known[key]


ALL = Method(True, True, "optimal", False, CHANNEL_GROUPS, row_scales=True, min_max=False, measured=True)
METHODS = {
    "min-max": Method(),
    "weight-per-channel": Method(per_channel_weight=True),
    "asymmetric": Method(asymmetric=True),
    "groups-uniform": Method(grouping="uniform"),
    "groups-optimal": Method(grouping="optimal"),
    "token-alone": Method(token=True),
    "row-scales": Method(row_scales=True),
    "channel-groups": Method(channel_groups=CHANNEL_GROUPS),
    "log2-attention": Method(log2_attention=True),
    "no-grouping": Method(True, True, None, False, 1, row_scales=True, min_max=False),
    "no-channel-groups": Method(True, True, "optimal", False, 1, row_scales=True, min_max=False),
    "no-timestep-groups": replace(ALL, grouping=None),
    "full-static": ALL,
    "full-static-log2": replace(ALL, log2_attention=True),
}
NATIVE = ("comfy-int8", "comfy-fp8")
PRESET_ROWS = ("w8a8-token", "w8a8-static")
PLAN, PLAN_FLOOR = "plan", "plan-floor"  # the best that fits, without 16-bit codes; the fastest that is predicted to reach a floor
PLAIN, GPTQ = "-plain", "-gptq"  # the plan's weights rounded to nearest; a preset's by second moments, as the plan's are
PLAN_ROWS, GPTQ_ROWS = (PLAN, PLAN + PLAIN, PLAN_FLOOR), tuple(row + GPTQ for row in PRESET_ROWS)
ROUNDED = (PLAN, PLAN_FLOOR, *GPTQ_ROWS)
FP16 = "fp16"
ALL_MODES = (FP16, *NATIVE, *METHODS, *PRESET_ROWS, FP8_PRESET, *GPTQ_ROWS, *PLAN_ROWS, *INT4_MODES)


def build_row(
    mode: str,
    bits: int,
    layers: Mapping[str, LayerSpec],
    calibration: Calibration,
    plan: Callable[[str], Recipe],
    known: Known,
    weight_of: WeightOf,
    moments: Callable[[], Mapping[str, Tensor]],
) -> Row:
    """The row of one of ALL_MODES but fp16. bits: of activations; fewer than 8 are simulated. plan: mode -> its recipe.

    moments: gathers those of layers' inputs that int8 weights are rounded by, in the modes of ROUNDED.
    """
    if mode in INT4_MODES:
        return Row(mode, int4_plans(mode, layers, lambda: ALL.plans(layers, calibration, known, weight_of)), bits)
    name = mode if mode.startswith("w8a8") else f"w8a{bits}-{mode}"
    name = name.replace("w8a8", f"w8a{bits}")
    if mode in METHODS:
        method = METHODS[mode]
        return Row(name, method.plans(layers, calibration, known, weight_of, bits), bits, bits if method.log2_attention else 0)
    linears = [layer for layer, spec in layers.items() if not spec.is_conv]
    if mode == "comfy-int8":
        return Row(mode, dict.fromkeys(linears, LayerPlan(Scheme())))
    if mode == "comfy-fp8":
        return Row(mode, dict.fromkeys(linears, LayerPlan(None)))
    found = moments() if mode in ROUNDED else {}
    recipe = plan(mode) if mode in PLAN_ROWS else preset_recipe(mode.removesuffix(GPTQ), layers)
    plans = {layer: LayerPlan(scheme, recipe.groups_of(layer), moments=found.get(layer)) for layer, scheme in recipe.schemes.items()}
    return Row(name, plans, bits)
