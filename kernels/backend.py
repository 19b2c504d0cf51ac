"""Which implementation runs on a device, and why. Chosen once per device; said once if it is not the fast one."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

from .repeat import forget_plans

logger = logging.getLogger(__name__)

OVERRIDE = "STEPQUANT_BACKEND"
# int8 tensor-core products need Ampere; Triton's int8 dot does not compile for Turing (tested with 3.6, 3.7 and 3.9).
MIN_TRITON_SM = 80
# Tensor cores take fp8 from Ada on; Triton refuses to compile it for older GPUs.
FP8_MIN_SM = 89


class Backend(str, Enum):
    """How the integer operations are carried out."""

    TRITON = "triton"  # this package's kernels
    REFERENCE = "reference"  # plain torch, exact integer sums
    DEQUANTIZED = "dequantized"  # no integer compute: codes become floats before they are multiplied

    @property
    def is_integer(self) -> bool:
        """Whether both operands of the products are integers."""
        return self is not Backend.DEQUANTIZED


@dataclass(frozen=True)
class BackendChoice:
    """The backend of one device. reason: why. remedy: what the user can do for a faster one; empty if nothing."""

    backend: Backend
    reason: str
    remedy: str = ""


_choices: dict[torch.device, BackendChoice] = {}
_fp8_choices: dict[torch.device, BackendChoice] = {}


def choose_backend(device: torch.device | str) -> BackendChoice:
    """The backend for tensors on `device`; found out at the first call, then remembered.

    STEPQUANT_BACKEND=triton|reference|dequantized overrides the choice. The CPU runs Triton only if both that asks for
    it and TRITON_INTERPRET=1 is set (Triton's interpreter, for tests).
    """
    known = _choices.get(device)
    if known is not None:
        return known
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    choice = _choices.get(device)
    return choice if choice is not None else _choose_and_report(device)


def choose_fp8_backend(device: torch.device | str) -> BackendChoice:
    """The same for operations on fp8 codes, which fewer GPUs have."""
    choice = _fp8_choices.get(device) or _fp8_choices.get(torch.device(device))
    if choice is None:
        choice, device = choose_backend(device), torch.device(device)
        if device.type == "cuda" and not os.environ.get(OVERRIDE, "").strip():
            choice = _with_fp8(device, choice)
        _fp8_choices[device] = choice
    return choice


def _with_fp8(device: torch.device, choice: BackendChoice) -> BackendChoice:
    if choice.backend is not Backend.TRITON:
        return BackendChoice(Backend.DEQUANTIZED, f"{choice.reason}; fp8 weights become floats first", choice.remedy)
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip or major * 10 + minor >= FP8_MIN_SM:
        return choice
    reason = f"{torch.cuda.get_device_name(device)} is sm_{major}{minor} and fp8 products need sm_{FP8_MIN_SM}; memory is saved but no time"
    remedy = "Quantize the model with w8a8-token, whose int8 products this GPU has."
    logger.warning("StepQuant on %s: fp8 layers run dequantized, %s. %s", device, reason, remedy)
    return BackendChoice(Backend.DEQUANTIZED, reason, remedy)


def forget_choices() -> None:
    """Choose anew at the next call, after the environment has changed."""
    _choices.clear()
    _fp8_choices.clear()
    forget_plans()


def _choose_and_report(device: torch.device) -> BackendChoice:
    choice = _overridden(device) or (_choose_on_cuda(device) if device.type == "cuda" else _choose_elsewhere(device))
    _choices[device] = choice
    if choice.remedy:
        logger.warning("StepQuant on %s: %s backend, %s. %s", device, choice.backend.value, choice.reason, choice.remedy)
    return choice


def _overridden(device: torch.device) -> BackendChoice | None:
    wanted = os.environ.get(OVERRIDE, "").strip().lower()
    if not wanted:
        return None
    names = [backend.value for backend in Backend]
    if wanted not in names:
        logger.warning("%s=%s is none of %s; it is ignored. Correct or unset it.", OVERRIDE, wanted, ", ".join(names))
        return None
    if wanted == Backend.TRITON.value and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return None  # meant for the GPU: models that are on the CPU must still run
    return BackendChoice(Backend(wanted), f"{OVERRIDE}={wanted} is set")


def _choose_elsewhere(device: torch.device) -> BackendChoice:
    if device.type == "cpu":
        return BackendChoice(Backend.REFERENCE, "the CPU runs the plain torch reference, exact int32 sums")
    return BackendChoice(
        Backend.DEQUANTIZED,
        f"there are no integer kernels for {device.type} devices, so that quantized layers save memory but no time",
        "Use an NVIDIA GPU (RTX 30 or newer) for integer compute.",
    )


def _choose_on_cuda(device: torch.device) -> BackendChoice:
    found, remedy = _why_not_triton(device)
    if not found:
        return BackendChoice(Backend.TRITON, f"{torch.cuda.get_device_name(device)} with Triton {triton_version()}")
    works = _failure(lambda: _try_int_mm(device)) == ""
    backend = Backend.REFERENCE if works else Backend.DEQUANTIZED
    effect = "int8 products through torch._int_mm, slower than 16 bit" if works else "no integer compute, memory is saved but no time"
    return BackendChoice(backend, f"{found} ({effect})", remedy)


def _why_not_triton(device: torch.device) -> tuple[str, str]:
    """(what is in the way, what to do), both empty if nothing is."""
    if torch.version.hip:
        return "the Triton kernels are not yet validated on AMD GPUs", f"Set {OVERRIDE}=triton to try them all the same."
    major, minor = torch.cuda.get_device_capability(device)
    if major * 10 + minor < MIN_TRITON_SM:
        found = f"{torch.cuda.get_device_name(device)} is sm_{major}{minor} and the kernels need sm_{MIN_TRITON_SM}"
        return found, "Use an RTX 30 series GPU or newer for the fast kernels."
    if triton_version() is None:
        package = "triton-windows" if os.name == "nt" else "triton"
        return "Triton is not installed", f"Run `pip install {package}` in ComfyUI's Python, in the version that your torch asks for."
    problem = _failure(lambda: _try_triton(device))
    if problem:
        return f"a test kernel failed ({problem})", "Install the Triton version that your torch asks for, and a C compiler on its path."
    return "", ""


def triton_version() -> str | None:
    """Version of the importable Triton, or None."""
    try:
        return str(importlib.import_module("triton").__version__)
    except (ImportError, OSError, RuntimeError):  # a broken installation counts as none
        return None


def _failure(attempt: Callable[[], bool]) -> str:
    """'' if the attempt returns True, else what went wrong in one line."""
    try:
        return "" if attempt() else "wrong result"
    except Exception as error:  # compilers, drivers and missing headers raise whatever they like; all mean "does not work here"
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _try_triton(device: torch.device) -> bool:
    quantize_token = importlib.import_module(".triton_ops.quantize_token", __package__).quantize_token
    x = torch.linspace(-1.0, 1.0, 255, device=device)[None]
    expected = torch.arange(-127, 128, dtype=torch.int8)
    return torch.equal(quantize_token(x).codes[0].cpu(), expected)


def _try_int_mm(device: torch.device) -> bool:
    codes = torch.arange(32 * 64, device=device).remainder(251).sub(125).to(torch.int8).view(32, 64)
    exact = codes.cpu().long() @ codes.cpu().long().t()
    return torch.equal(torch._int_mm(codes, codes.t()).cpu().long(), exact)
