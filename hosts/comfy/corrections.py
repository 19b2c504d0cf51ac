"""Corrections of the UNet's output on a quantized MODEL: a wrapper around the UNet of a clone, inside of guidance and other wrappers.

Looks the timestep up on the device: no host sync, and the UNet itself runs as ever, as a CUDA graph too. Tables are in quant/corrections.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...errors import FormatError, ModelError
from ...quant.corrections.correction_file import Corrections
from ...quant.corrections.output import OutputCorrection
from ...quant.tuning.identity import check_identity
from .scale_lora import reader

WRAPPER_KEY = "stepquant_corrections"
AUTO = "auto"


def with_corrections(model: ModelPatcher, corrections: Corrections, method: str, file: str) -> tuple[ModelPatcher, str | None]:
    """A clone of the MODEL whose UNet is corrected, and the method that it uses; `model` is left as it is.

    Args: method: AUTO for the one that helped most on held-out prompts, none if none did. file: name for error messages.
    Raises: ModelError if the MODEL is not quantized or is another one than was measured; FormatError if the file lacks the method.
    """
    state = getattr(model.model, "stepquant", None)
    if state is None:
        raise ModelError(f"{file}: corrections are those of a quantized model. Put Quantize SDXL or Load quantized before this node.")
    check_identity(corrections.base, reader(model), state.base_model, file)
    chosen = corrections.chosen() if method == AUTO else method
    if chosen is not None and chosen not in corrections.tables:
        raise FormatError(f"{file}: holds no {chosen}; it has {', '.join(corrections.tables)}. Choose one of these, or auto.")
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, WRAPPER_KEY)
    if chosen is not None:
        clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, WRAPPER_KEY, _Corrected(corrections.tables[chosen]))
    return clone, chosen


class _Corrected:
    """ComfyUI's wrapper of a UNet's forward."""

    def __init__(self, correction: OutputCorrection) -> None:
        self._correction = correction

    def __call__(self, executor: Callable[..., Tensor], x: Tensor, timesteps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._correction.gain.device != x.device:
            self._correction = self._correction.on(x.device)
        bucket = executor.class_obj.time_embed[0].tap.bucket_of(timesteps)
        if self._correction.touches_input:
            x = self._correction.correct_input(x, bucket)
        return self._correction.correct_output(executor(x, timesteps, *args, **kwargs), bucket)
