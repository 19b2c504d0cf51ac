"""Writes a quantized MODEL as a StepQuant file. What ComfyUI's own save nodes write is in dense_saving.py."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import comfy.sd
import torch
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...errors import ModelError
from ...kernels.int4_weight import stored_scales
from ...quant.file_format import QuantizedLayer, QuantizedModel, write_model
from ...version import VERSION
from .attach import state_of
from .layouts import unpack
from .lora import quantized_layers
from .ops import QuantizableOp

logger = logging.getLogger(__name__)
UNET = "diffusion_model."
LIVE_PARTS = ("weight", "bias", "act_scale", "act_zero_point")


@dataclass(frozen=True)
class SavedFile:
    """patches_left_out: how many weights carry a LoRA or merge that the file does not hold."""

    path: Path
    size_bytes: int
    patches_left_out: int


def save_quantized(
    model: ModelPatcher,
    path: str | Path,
    clip: comfy.sd.CLIP | None = None,
    vae: comfy.sd.VAE | None = None,
    base_model: dict[str, str | None] | None = None,
) -> SavedFile:
    """Write the model, with text encoders and VAE if given; the file appears whole or not at all.

    LoRAs and merges that were put on the model after it was quantized are not in the file: baking them in would
    quantize the weights anew. Apply them again after loading, or put them on before Quantize.
    Args:
        base_model: {"name", "sha256"} of what was quantized; by default what is known from quantizing or loading.
    Raises: ModelError if the model is not a quantized one; FormatError if the file cannot be written.
    """
    write_model(path, stored_model(model, clip, vae, base_model), VERSION)
    return describe_written(model, path)


def stored_model(
    model: ModelPatcher,
    clip: comfy.sd.CLIP | None = None,
    vae: comfy.sd.VAE | None = None,
    base_model: dict[str, str | None] | None = None,
) -> QuantizedModel:
    """What a file of this MODEL holds, without LoRAs and merges. Raises ModelError if it is not a quantized one."""
    state = state_of(model)
    if state is None:
        raise ModelError("Save and Export native: this model is not quantized. Connect the output of Quantize SDXL (StepQuant).")
    return QuantizedModel(
        layers=_layers(model),
        rest=_rest(model),
        recipe=state.recipe,
        base_model=base_model or state.base_model,
        calibration=state.calibration,
        extra=_extra(model, clip, vae),
    )


def describe_written(model: ModelPatcher, path: str | Path) -> SavedFile:
    """What was written at `path`; warns of what it does not hold."""
    left_out = sum(key.startswith(UNET) for key in model.patches)
    if left_out:
        logger.warning("%s: %d weights carry a LoRA or merge, which is not in the file. Apply it again after loading.", path, left_out)
    return SavedFile(Path(path), Path(path).stat().st_size, left_out)


def _layers(model: ModelPatcher) -> dict[str, QuantizedLayer]:
    layers = quantized_layers(model.model)
    return {key.removeprefix(UNET).removesuffix(".weight"): _stored_layer(model, key, module) for key, module in layers}


def _stored_layer(model: ModelPatcher, key: str, module: QuantizableOp) -> QuantizedLayer:
    backup = model.backup.get(key)
    parts = unpack(module.weight if backup is None else backup.weight)
    bias_key = key.removesuffix("weight") + "bias"
    bias = None if module.bias is None else _compact(_unpatched(model, bias_key, module.bias))
    layer = QuantizedLayer(parts.qweight, parts.weight_scale, bias, module.act_scale, module.act_zero_point)
    if parts.group_scale is not None:
        layer.group_scale = stored_scales(parts.group_scale, module.weight.shape[1])
    if parts.branch is not None:
        layer.branch_down, layer.branch_up = parts.branch.down, parts.branch.up
    if parts.groups is not None:
        layer.channel_order, layer.channel_exponents = parts.groups.order, parts.groups.exponents
    return layer


def _rest(model: ModelPatcher) -> dict[str, Tensor]:
    names = [key.removesuffix("weight") for key, _ in quantized_layers(model.model)]
    ours = {name + part for name in names for part in LIVE_PARTS}
    state_dict = model.model_state_dict(UNET)
    return {key.removeprefix(UNET): _compact(_unpatched(model, key, tensor)) for key, tensor in state_dict.items() if key not in ours}


def _unpatched(model: ModelPatcher, key: str, tensor: Tensor) -> Tensor:
    backup = model.backup.get(key)
    return tensor if backup is None else backup.weight


def _compact(tensor: Tensor) -> Tensor:
    """fp16 if that loses nothing: ComfyUI loads fp16 files as fp32 on a CPU."""
    if tensor.dtype is not torch.float32:
        return tensor
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor


def _extra(model: ModelPatcher, clip: comfy.sd.CLIP | None, vae: comfy.sd.VAE | None) -> dict[str, Tensor]:
    """Text encoders and VAE by the keys of a stock checkpoint, and the markers that tell the sampling."""
    config = model.model.model_config
    extra = _sampling_markers(model)
    if clip is not None:
        clip.load_model()
        tensors = clip.get_sd()
        if any(key.endswith(".comfy_quant") for key in tensors):  # a checkpoint has no place for their scales
            raise ModelError("Save and Export native: this CLIP is 8 bit, in a file of its own. Leave clip open, or connect a 16-bit one.")
        weights = config.process_clip_state_dict_for_saving(tensors)
        extra.update({key: tensor.detach().cpu() for key, tensor in weights.items()})
    if vae is not None:
        extra.update({key: tensor.detach().cpu() for key, tensor in config.process_vae_state_dict_for_saving(vae.get_sd()).items()})
    return extra


def _sampling_markers(model: ModelPatcher) -> dict[str, Tensor]:
    """The keys by which ComfyUI's detection tells an SDXL's own sampling (a sampling node's is not the model's)."""
    kind = model.model.model_type
    sampling = model.object_patches_backup.get("model_sampling", model.model.model_sampling)
    if kind is ModelType.V_PREDICTION:
        return {"v_pred": torch.zeros(0)} | ({"ztsnr": torch.zeros(0)} if getattr(sampling, "zsnr", False) else {})
    if kind is ModelType.V_PREDICTION_EDM:
        ends = {"edm_vpred.sigma_max": sampling.sigma_max, "edm_vpred.sigma_min": sampling.sigma_min}
        return {key: torch.as_tensor(value).float().cpu() for key, value in ends.items()}
    if kind is ModelType.EDM:  # Playground 2.5: their presence is what counts, ComfyUI has the values
        return {"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)}
    return {}
