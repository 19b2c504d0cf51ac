"""Refuses a ComfyUI that lacks what the nodes build on, in one sentence. Imports nothing that an old ComfyUI lacks."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

from ...errors import HostError

OLDEST = "0.33.0"


def check_comfyui() -> None:
    """Raise HostError unless this ComfyUI has quantized tensors, dynamic VRAM and the node API that StepQuant uses.

    The features are looked for, not the version: forks and builds from source carry other numbers.
    """
    missing = [what for what, present in _features() if not present()]
    if missing:
        raise HostError(
            f"StepQuant: this ComfyUI ({_version()}) has no {' and no '.join(missing)}; "
            f"ComfyUI {OLDEST} or newer is needed. Update ComfyUI."
        )


def _features() -> list:
    return [
        ("quantized tensors (comfy.quant_ops, comfy_kitchen)", lambda: _has("comfy.quant_ops") and _has("comfy_kitchen")),
        ("weights that change while offloaded (comfy.ops.CastBiasWeightContext)", lambda: _has("comfy.ops", "CastBiasWeightContext")),
        ("dynamic VRAM (comfy.model_patcher.ModelPatcherDynamic)", lambda: _has("comfy.model_patcher", "ModelPatcherDynamic")),
        ("V3 node API (comfy_api.latest)", lambda: _has("comfy_api.latest", "ComfyExtension")),
    ]


def _has(module: str, attribute: str | None = None) -> bool:
    try:
        if find_spec(module) is None:
            return False
        return attribute is None or hasattr(importlib.import_module(module), attribute)
    except ImportError:
        return False


def _version() -> str:
    try:
        return str(importlib.import_module("comfyui_version").__version__)
    except (ImportError, AttributeError):
        return "of unknown version"
