"""The schemes of all layers and how they were chosen: what a preset, and later a plan, produces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..errors import SchemeError
from .layers import has_symmetric_input, needs_row_scales
from .scheme import ActivationMode, Scheme
from .timestep import NUM_BUCKETS, uniform_groups

PRESETS = ("w8a8-token", "w8a8-static")
DEFAULT_GROUPS = 8  # best in ADP-DM's ablation (arXiv 2305.18723)


@dataclass(frozen=True)
class Recipe:
    """A layer that is not in `schemes` stays 16 bit. groups: timestep group of each of the 64 buckets."""

    schemes: Mapping[str, Scheme]
    preset: str
    chosen_by: str
    groups: tuple[int, ...] = field(default_factory=lambda: uniform_groups(1))

    @property
    def needs_calibration(self) -> bool:
        return any(scheme.activation is ActivationMode.STATIC for scheme in self.schemes.values())

    def to_json(self) -> dict[str, object]:
        return {
            "preset": self.preset,
            "chosen_by": self.chosen_by,
            "groups": list(self.groups),
            "schemes": {name: scheme.to_json() for name, scheme in self.schemes.items()},
        }

    @classmethod
    def from_json(cls, data: object, source: str) -> Recipe:
        """Raises SchemeError naming `source` or the layer if a part is missing or unknown."""
        if not isinstance(data, dict) or not isinstance(data.get("schemes"), dict):
            raise SchemeError(f"{source}: the recipe is missing or damaged. Quantize the model again.")
        groups = data.get("groups")
        if not isinstance(groups, list) or len(groups) != NUM_BUCKETS or not all(isinstance(g, int) for g in groups):
            raise SchemeError(f"{source}: the recipe's timestep groups are not {NUM_BUCKETS} whole numbers. Quantize the model again.")
        schemes = {name: Scheme.from_json(scheme, name) for name, scheme in data["schemes"].items()}
        return cls(schemes, str(data.get("preset")), str(data.get("chosen_by")), tuple(groups))


def preset_recipe(preset: str, layers: Iterable[str], groups: int = DEFAULT_GROUPS) -> Recipe:
    """The recipe of a preset for the given quantizable layers.

    Args:
        preset: one of PRESETS.
        layers: layer names, as found by layers.find_layers.
        groups: timestep groups of static activations, 1 to 64.
    Raises: SchemeError if the preset is unknown.
    """
    if preset not in PRESETS:
        raise SchemeError(f"preset {preset!r}: unknown; choose one of {', '.join(PRESETS)}.")
    static = preset == "w8a8-static"
    schemes = {}
    for name in layers:
        if static and not needs_row_scales(name):
            schemes[name] = Scheme(activation=ActivationMode.STATIC, symmetric=has_symmetric_input(name))
        else:
            schemes[name] = Scheme()
    return Recipe(schemes, preset, "preset", uniform_groups(groups if static else 1))
