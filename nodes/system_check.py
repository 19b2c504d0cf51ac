"""System check: what will run here and what to do if that is slow. Measures nothing; reads no personal data."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence

import comfy.model_management
import comfyui_version
from comfy_api.latest import io

from ..version import VERSION
from .preview import show
from .quantize import CATEGORY

# What each backend means to the artist; the keys are the values of kernels.backend.Backend.
MEANING = {
    "triton": "fast int8 kernels",
    "reference": "plain torch, exact int8 but slow",
    "dequantized": "16-bit compute: memory is saved, but no time",
}


class StepQuantSystemCheck(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StepQuantSystemCheck",
            display_name="System check (StepQuant)",
            category=CATEGORY,
            description="Says which kernels will run on this computer and what to do if none does. Paste the text into a bug report.",
            search_aliases=["diagnostics", "GPU info", "triton check", "bug report"],
            inputs=[],
            outputs=[io.String.Output("report", display_name="report", tooltip="The text shown on the node.")],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ..hosts.comfy.graph import describe_runners
        from ..kernels.backend import choose_backend
        from ..kernels.describe import describe

        device = comfy.model_management.get_torch_device()
        report = write_report(describe(), str(device), choose_backend(device), describe_runners())
        return io.NodeOutput(report, ui=show(cls, report))


def write_report(found: Mapping, device: str, choice, models: Sequence[str] = ()) -> str:
    """The report as text.

    Args:
        found: what kernels.describe.describe returns. device: the one ComfyUI computes on, such as cuda:0.
        choice: the BackendChoice of that device. models: one sentence for each quantized model in memory, on its CUDA graphs.
    """
    names = {one["device"]: one["name"] for one in found["devices"]}
    lines = [f"{names.get(device, device)}: {MEANING.get(choice.backend.value, choice.backend.value)}."]
    if choice.remedy:
        lines += [f"Why: {choice.reason}.", f"What to do: {choice.remedy}"]
    if any(one["device"] == device and one["fastest"] == "fp8" for one in found["devices"]):
        lines.append("The faster 8-bit preset on this kind of GPU is w8a8-fp8.")
    lines += [f"Model {number}: {sentence}." for number, sentence in enumerate(models, 1)]
    lines += [
        "",
        f"StepQuant {VERSION}, ComfyUI {comfyui_version.__version__}, dynamic VRAM {'on' if _has_dynamic_vram() else 'off'}",
        f"comfy-kitchen {_version('comfy-kitchen')}, comfy-aimdo {_version('comfy-aimdo')}",
        f"torch {found['torch']}, CUDA {found['cuda'] or 'none'}, ROCm {found['hip'] or 'none'}, Triton {found['triton'] or 'none'}",
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}",
    ]
    for one in found["devices"]:
        details = [f"sm_{one['sm']}"] if one["sm"] else []
        details += [f"{one['memory_gib']} GiB"] if one["memory_gib"] else []
        lines.append(f"{one['device']}: {', '.join([one['name'], *details])}: {one['backend']}, {one['reason']}")
    return "\n".join(lines)


def _has_dynamic_vram() -> bool:
    import comfy.memory_management

    return bool(getattr(comfy.memory_management, "aimdo_enabled", False))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


NODES = [StepQuantSystemCheck]
