"""Opens a StepQuant file as a ComfyUI MODEL, and the CLIP and VAE of a whole checkpoint. Quantizes nothing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...errors import FormatError
from ...quant.file_format import Header, QuantizedModel, read_header, read_model
from ...quant.layers import UNET_PREFIX, check_is_sdxl
from ..acceleration import Acceleration
from .attach import attach
from .ops import StepQuantOps

# Keys by which ComfyUI tells the sampling of an SDXL: they lie beside the UNet, and detection wants them with it.
SAMPLING_MARKERS = ("v_pred", "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")
CLIP_PREFIX, VAE_PREFIX = "conditioner.", "first_stage_model."


@dataclass(frozen=True)
class LoadedModel:
    """clip and vae are None if the file holds a UNet only."""

    model: ModelPatcher
    clip: comfy.sd.CLIP | None
    vae: comfy.sd.VAE | None
    header: Header


def load_quantized(
    path: str | Path, embedding_directory: list[str] | None = None, acceleration: Acceleration | str = Acceleration.AUTO
) -> LoadedModel:
    """Open a file that StepQuant wrote.

    Args: acceleration: how much of the UNet runs as one piece.
    Raises: FormatError, SchemeError or ModelError naming the file, what is wrong with it and what to do.
    """
    path = str(path)
    header, stored = read_header(path), read_model(path)
    patcher = _load_unet(path, stored, Acceleration(acceleration), disable_dynamic=False)
    clip, vae = _load_clip_and_vae(path, stored, embedding_directory)
    return LoadedModel(patcher, clip, vae, header)


def load_patcher(path: str, acceleration: Acceleration | str = Acceleration.AUTO, disable_dynamic: bool = False) -> ModelPatcher:
    """The MODEL alone: what ComfyUI calls to make it again, for hooks, other GPUs or without dynamic VRAM."""
    return _load_unet(path, read_model(path), Acceleration(acceleration), disable_dynamic)


def load_clip_patcher(path: str, embedding_directory: list[str] | None = None, disable_dynamic: bool = False) -> ModelPatcher:
    """As load_patcher, for the CLIP of a whole checkpoint."""
    clip, _ = _load_clip_and_vae(path, read_model(path), embedding_directory, VAE_PREFIX, disable_dynamic)
    return clip.patcher


def load_vae_patcher(path: str, disable_dynamic: bool = False) -> ModelPatcher:
    """As load_patcher, for the VAE of a whole checkpoint."""
    _, vae = _load_clip_and_vae(path, read_model(path), None, CLIP_PREFIX, disable_dynamic)
    return vae.patcher


def fingerprint(path: str | Path) -> str:
    """Changes when the file does, without reading its gigabytes: size, time of change and header.

    Raises: FormatError if the file is missing or not ours.
    """
    facts = Path(path).stat() if Path(path).is_file() else None
    header = read_header(path)  # says what is wrong with the file if anything is
    text = f"{facts.st_size} {facts.st_mtime_ns} {header.recipe.to_json()}"
    return hashlib.sha256(text.encode()).hexdigest()


def _load_unet(path: str, stored: QuantizedModel, acceleration: Acceleration, disable_dynamic: bool) -> ModelPatcher:
    outer = _with_stubs(stored)
    check_is_sdxl({key: tensor.shape for key, tensor in outer.items()}, path)
    state_dict = outer | {marker: stored.extra[marker] for marker in SAMPLING_MARKERS if marker in stored.extra}
    for name, layer in stored.layers.items():
        state_dict.update({f"{name}.{part}": tensor for part, tensor in vars(layer).items() if tensor is not None})
    options = {"custom_operations": StepQuantOps, "dtype": _choose_dtype(outer)}
    try:
        patcher = comfy.sd.load_diffusion_model_state_dict(state_dict, model_options=options, disable_dynamic=disable_dynamic)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        found = " ".join(str(error).split())
        raise FormatError(f"{path}: tensors do not fit this UNet ({found}). Download or make the file again.") from None
    if patcher is None:
        raise FormatError(f"{path}: ComfyUI does not recognise this UNet as an SDXL. Update ComfyUI, or make the file again.")
    _check_complete(path, patcher, outer)
    if not comfy.model_management.is_device_cpu(patcher.offload_device):
        patcher.model.to(patcher.offload_device)
    attach(patcher, stored.recipe, stored.base_model, stored.calibration, acceleration)
    patcher.cached_patcher_init = (load_patcher, (path, acceleration))
    return patcher


def _with_stubs(stored: QuantizedModel) -> dict[str, Tensor]:
    """The UNet as detection must see it: shapes and dtypes of float weights, without data where codes stand for them."""
    tensors = dict(stored.rest)
    for name, layer in stored.layers.items():
        tensors[f"{name}.weight"] = torch.empty(layer.weight_shape, dtype=torch.float16, device="meta")
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias
    return tensors


def _choose_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """As ComfyUI would for the fp16 model. Left to itself it would take the dtype that most tensors have, and with
    --fp8_e4m3fn-unet one that the few layers which stay 16 bit are kept 16 bit to avoid."""
    parameters = sum(tensor.numel() for tensor in tensors.values())
    dtype = comfy.model_management.unet_dtype(model_params=parameters, weight_dtype=torch.float16)
    return dtype if dtype.itemsize > 1 else torch.float16


def _check_complete(path: str, patcher: ModelPatcher, given: dict[str, Tensor]) -> None:
    """ComfyUI only logs what is missing, and would sample noise."""
    expected = [key for key in patcher.model.diffusion_model.state_dict() if not key.endswith(("act_scale", "act_zero_point"))]
    missing = [key for key in expected if key not in given]
    if missing:
        raise FormatError(f"{path}: {missing[0]} is missing ({len(missing)} in all). The file is incomplete; download or make it again.")


def _load_clip_and_vae(
    path: str, stored: QuantizedModel, embedding_directory: list[str] | None, leave_out: str = "", disable_dynamic: bool = False
) -> tuple[comfy.sd.CLIP | None, comfy.sd.VAE | None]:
    extra = {key: tensor for key, tensor in stored.extra.items() if not leave_out or not key.startswith(leave_out)}
    wanted = [any(key.startswith(prefix) for key in extra) for prefix in (CLIP_PREFIX, VAE_PREFIX)]
    if not any(wanted):
        return None, None
    state_dict = extra | {UNET_PREFIX + key: tensor for key, tensor in _with_stubs(stored).items()}
    _, clip, vae, _ = comfy.sd.load_state_dict_guess_config(
        state_dict,
        output_clip=wanted[0],
        output_vae=wanted[1],
        output_model=False,
        embedding_directory=embedding_directory,
        disable_dynamic=disable_dynamic,
    )
    if clip is not None:
        clip.patcher.cached_patcher_init = (load_clip_patcher, (path, embedding_directory))
    if vae is not None:
        vae.patcher.cached_patcher_init = (load_vae_patcher, (path,))
    return clip, vae
