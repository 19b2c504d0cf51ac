"""The schemes of all layers and how they were chosen: what a preset, and later a plan, produces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..errors import SchemeError
from .int4 import can_be_int4
from .layers import LayerSpec, gains_from_fp8, has_symmetric_input, keeps_8_bits, needs_row_scales
from .log2_attention import AttentionScheme, attention_schemes
from .real_sensitivity import kept_16_bit
from .saturation import DEFAULT_LIMIT
from .scheme import FP8, ActivationMode, ComputeType, Scheme, token_scheme
from .timestep import NUM_BUCKETS, ScaleCurve, uniform_groups

INT4_PRESETS = ("w4a8-token", "w4a8-mixed")
FP8_PRESET = "w8a8-fp8"
PRESETS = ("w8a8-token", "w8a8-static", *INT4_PRESETS, FP8_PRESET)
# Of a layer whose input does not bear 8 bits, in a preset that saves memory first.
INT4_FLOAT = Scheme(weight_bits=4, activation=ActivationMode.FP16, compute=ComputeType.FP16)
DEFAULT_GROUPS = 8  # best in ADP-DM's ablation (arXiv 2305.18723)


@dataclass(frozen=True)
class Recipe:
    """A layer that is not in `schemes` stays 16 bit. groups: timestep group of each of the 64 buckets.

    layer_groups: of layers that have groups of their own. grouping: the method that made them (grouping.GroupingMethod).
    curve_points: if not 0, static scales follow a curve of so many coefficients instead of groups.
    attention: of attention layers (their names end in attn1 or attn2); the others are the engine's own.
    saturation_limit: share of clipped values, in [0, 1], above which a static layer measures its input for the rest of a run.
    """

    schemes: Mapping[str, Scheme]
    preset: str
    chosen_by: str
    groups: tuple[int, ...] = field(default_factory=lambda: uniform_groups(1))
    layer_groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    grouping: str = "uniform"
    curve_points: int = 0
    attention: Mapping[str, AttentionScheme] = field(default_factory=dict)
    saturation_limit: float = DEFAULT_LIMIT

    @property
    def needs_calibration(self) -> bool:
        return any(scheme.needs_calibration for scheme in self.schemes.values())

    def groups_of(self, layer: str) -> tuple[int, ...] | ScaleCurve:
        """What a layer's static scales follow: the groups of the 64 buckets, or a curve."""
        return ScaleCurve(self.curve_points) if self.curve_points else self.layer_groups.get(layer, self.groups)

    def to_json(self) -> dict[str, object]:
        return {
            "preset": self.preset,
            "chosen_by": self.chosen_by,
            "groups": list(self.groups),
            "grouping": self.grouping,
            "curve_points": self.curve_points,
            "layer_groups": {name: list(groups) for name, groups in self.layer_groups.items()},
            "schemes": {name: scheme.to_json() for name, scheme in self.schemes.items()},
            "attention": {name: scheme.to_json() for name, scheme in self.attention.items()},
            "saturation_limit": self.saturation_limit,
        }

    @classmethod
    def from_json(cls, data: object, source: str) -> Recipe:
        """Raises SchemeError naming `source` or the layer if a part is missing or unknown."""
        if not isinstance(data, dict) or not isinstance(data.get("schemes"), dict):
            raise SchemeError(f"{source}: the recipe is missing or damaged. Quantize the model again.")
        groups = _checked_groups(data.get("groups"), source)
        own, points = data.get("layer_groups", {}), data.get("curve_points", 0)
        if not isinstance(own, dict) or type(points) is not int or not 0 <= points <= NUM_BUCKETS:
            raise SchemeError(f"{source}: the recipe's timestep groups are damaged. Quantize the model again.")
        layer_groups = {name: _checked_groups(one, f"{source}: {name}") for name, one in own.items()}
        schemes = {name: Scheme.from_json(scheme, name) for name, scheme in data["schemes"].items()}
        attention = attention_schemes(data.get("attention", {}), source)
        texts = (str(data.get("preset")), str(data.get("chosen_by")))
        limit = data.get("saturation_limit", DEFAULT_LIMIT)
        if type(limit) not in (int, float) or not 0 <= limit <= 1:
            raise SchemeError(f"{source}: saturation_limit {limit!r}; a share from 0 to 1 is needed. Quantize the model again.")
        return cls(schemes, *texts, groups, layer_groups, str(data.get("grouping", "uniform")), points, attention, float(limit))


def _checked_groups(groups: object, source: str) -> tuple[int, ...]:
    if not isinstance(groups, list) or len(groups) != NUM_BUCKETS or not all(type(g) is int and 0 <= g < NUM_BUCKETS for g in groups):
        raise SchemeError(f"{source}: the recipe's timestep groups are not {NUM_BUCKETS} whole numbers. Quantize the model again.")
    return tuple(groups)


def preset_recipe(preset: str, layers: Iterable[str] | Mapping[str, LayerSpec], groups: int = DEFAULT_GROUPS) -> Recipe:
    """The recipe of a preset for the given quantizable layers.

    Args:
        preset: one of PRESETS.
        layers: layer names, as found by layers.find_layers; with their shapes for w4a8-token, which gives 4 bits to Linears, and for
            w4a8-mixed, which leaves 8 to those that layers.keeps_8_bits names.
        groups: timestep groups of static activations, 1 to 64.
    Without a calibration (the token presets) real_sensitivity.kept_16_bit tells what stays 16 bit; of 4-bit weights the input only,
    beside fp8 nothing.
    Raises: SchemeError if the preset is unknown.
    """
    if preset not in PRESETS:
        raise SchemeError(f"preset {preset!r}: unknown; choose one of {', '.join(PRESETS)}.")
    static = preset == "w8a8-static"
    if preset in INT4_PRESETS and not isinstance(layers, Mapping):
        raise SchemeError(f"{preset}: layers without shapes; which ones can have 4 bits depends on them. Pass what find_layers found.")
    names, schemes = list(layers), {}
    # These layers are in fp8 there, whose error is a share of each value, however large another in its row is.
    kept = frozenset() if static or preset == FP8_PRESET else kept_16_bit(names)
    for name in names:
        if preset in INT4_PRESETS and can_be_int4(layers[name].shape) and not (preset == "w4a8-mixed" and keeps_8_bits(name)):
            schemes[name] = INT4_FLOAT if name in kept else Scheme(weight_bits=4)
        elif name in kept:
            continue
        elif preset == FP8_PRESET and gains_from_fp8(name):
            schemes[name] = FP8
        elif static and not needs_row_scales(name):
            schemes[name] = Scheme(activation=ActivationMode.STATIC, symmetric=has_symmetric_input(name))
        else:
            schemes[name] = token_scheme(name)
    return Recipe(schemes, preset, "preset", uniform_groups(groups if static else 1))
