"""What the report panel and the sidebar show, as plain data: web/report_view.js draws it, HTTP users find it in the history.

A report is JSON: `title`; `figures` [text]; `sizes` [{label, bytes}]; `schemes` [{label, layers}]; `layers` [{name, why}];
`steps_db` [number or null]; `pictures` {before, after}, each as ComfyUI's /view takes it. Absent parts are not shown.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from ..quant.layers import find_layers
from ..quant.recipe import Recipe
from ..quant.scheme import Scheme

REPORT_KEY = "stepquant_report"
HALF_BYTES = 2
# The front end keeps every report with its node; the file and Compare's picture hold the rest.
MOST_LAYERS = 64


def with_report(shown: Mapping[str, object], report: Mapping[str, object]) -> dict[str, object]:
    """`shown`, the `ui` part of a NodeOutput, with the report beside its text and pictures."""
    return {**shown, REPORT_KEY: [dict(report)]}


def model_report(model, title: str, figures: Sequence[str]) -> dict[str, object]:
    """Of a quantized MODEL: its recipe at a glance, and what it takes instead of what it would in 16 bit."""
    from ..hosts.comfy.attach import state_of

    recipe = state_of(model).recipe
    shapes = {name: tuple(tensor.shape) for name, tensor in model.model.diffusion_model.state_dict().items()}
    kept = sorted(set(find_layers(shapes)) - set(recipe.schemes))
    half = HALF_BYTES * sum(math.prod(shape) for shape in shapes.values())
    return {
        "title": title,
        "figures": list(figures),
        "sizes": [{"label": "fp16", "bytes": half}, {"label": "StepQuant", "bytes": model.model_size()}],
        "schemes": scheme_counts(recipe) + ([{"label": "16 bit, by the recipe", "layers": len(kept)}] if kept else []),
        "layers": named_layers(kept, "kept in 16 bit by the recipe"),
    }


def scheme_counts(recipe: Recipe) -> list[dict[str, object]]:
    """[{label, layers}], the commonest first."""
    return [{"label": label, "layers": count} for label, count in Counter(map(_label, recipe.schemes.values())).most_common()]


def named_layers(names: Sequence[str], why: str) -> list[dict[str, str]]:
    """The first of them, each with the reason."""
    return [{"name": name, "why": why} for name in names[:MOST_LAYERS]]


def finite_steps(decibels: Sequence[float]) -> list[float | None]:
    """JSON has no infinity: a step that is equal, or was not measured, is null."""
    return [round(value, 2) if math.isfinite(value) else None for value in decibels]


def _label(scheme: Scheme) -> str:
    zero_point = "" if scheme.symmetric else " with zero point"
    return f"W{scheme.weight_bits}, {scheme.activation.value.replace('_', ' ')}{zero_point}, {scheme.compute.value}"
