"""SDXL's text encoders in 8 bit: from a CLIP into a file, and back as a CLIP on ComfyUI's own int8 operations.

ComfyUI 0.33 has them for text encoders (mixed_precision_ops), but its CLIP loaders ask for them only for some models: SDXL's would
load the codes as if they were weights. So a loader of ours asks; what it returns is a stock CLIP, and nothing of ours runs in it.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.sd
import comfy.sdxl_clip
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...errors import FormatError
from ...quant.safe_header import damaged
from ...quant.text_encoder import quantize_text_encoders, read_text_encoders, write_text_encoders
from ...version import VERSION

OPTIONS: dict[str, Any] = {"quantization_metadata": {"mixed_ops": True}}
# What ComfyUI does without where a checkpoint has none: L's projection, which SDXL does not use, and CLIP's temperature.
DISPENSABLE = ("logit_scale", "clip_l.transformer.text_projection.weight")


def save_text_encoders(clip: comfy.sd.CLIP, path: str | Path) -> int:
    """Write SDXL's CLIP with 8-bit weights, LoRAs on it included. Returns the file's bytes.

    Raises: ModelError if it is not SDXL's, or 8 bit already; FormatError if the file cannot be written.
    """
    clip.load_model()
    write_text_encoders(path, quantize_text_encoders(clip.get_sd(), "the CLIP"), VERSION)
    return Path(path).stat().st_size


def load_text_encoders(
    path: str | Path,
    embedding_directory: list[str] | None = None,
    model_options: dict[str, Any] | None = None,
    disable_dynamic: bool = False,
) -> comfy.sd.CLIP:
    """The CLIP of a file that save_text_encoders or the command wrote.

    Args: model_options: more of ComfyUI's, such as another size of the encoders.
    Raises: FormatError naming the file if it is damaged, incomplete or of another model.
    """
    path, options = str(path), {**OPTIONS, **(model_options or {})}
    tensors = read_text_encoders(path)
    target = SimpleNamespace(clip=comfy.sdxl_clip.SDXLClipModel, tokenizer=comfy.sdxl_clip.SDXLTokenizer, params={})
    try:
        clip = comfy.sd.CLIP(
            target,
            embedding_directory=embedding_directory,
            parameters=sum(tensor.numel() for tensor in tensors.values()),
            state_dict=dict(tensors),  # loading empties it
            model_options=options,
            disable_dynamic=disable_dynamic,
        )
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        found = " ".join(str(error).split())[:200]
        raise FormatError(f"{path}: these are not SDXL's text encoders ({found}). Choose another file.") from None
    _check_complete(path, clip, tensors)
    clip.patcher.cached_patcher_init = (load_patcher, (path, embedding_directory, model_options))
    return clip


def load_patcher(
    path: str,
    embedding_directory: list[str] | None = None,
    model_options: dict[str, Any] | None = None,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """What ComfyUI calls to make the CLIP's patcher again, for hooks and without dynamic VRAM."""
    return load_text_encoders(path, embedding_directory, model_options, disable_dynamic).patcher


def _check_complete(path: str, clip: comfy.sd.CLIP, given: dict[str, Tensor]) -> None:
    """ComfyUI only logs what is missing, and would encode noise."""
    missing = [key for key in clip.cond_stage_model.state_dict() if key not in given and not key.endswith(DISPENSABLE)]
    if missing:
        raise damaged(path, f"{missing[0]} is missing, {len(missing)} in all")
