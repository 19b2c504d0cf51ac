"""Opens an SDXL checkpoint in one file as a diffusers pipeline, without network: full size, or the demo model's.

A checkpoint quantized by StepQuant opens too. Files with the UNet alone do not: they hold no text encoders.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ..demo import architecture as demo_architecture
from ..demo.ldm_state import CLIP_G_PREFIX, CLIP_L_PREFIX, VAE_PREFIX, text_from_ldm, unet_from_ldm, vae_from_ldm
from ..demo.tokenizer import build_tokenizers
from ..errors import FormatError, ModelError
from ..hosts.checkpoint_file import TensorFile, open_checkpoint, open_tensor_file
from ..hosts.diffusers import sdxl_config
from ..hosts.diffusers.unet_file import install_model
from ..hosts.key_mapping import UnknownUNetKey
from ..quant.file_format import HEADER_KEY, read_model
from ..quant.layers import UNET_PREFIX

# Marks that trainers leave in a checkpoint: predicts velocity; trained down to zero terminal signal.
V_PREDICTION_KEY = "v_pred"
ZERO_SNR_KEY = "ztsnr"

CONV_IN = "input_blocks.0.0.weight"
GIVE_BASE = "Give a checkpoint of SDXL base's architecture; the refiner and UNets with fewer blocks are not supported."


def load_pipeline(
    checkpoint: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> StableDiffusionXLPipeline:
    """Open a checkpoint with UNet, both text encoders and VAE under SDXL's (LDM) key names.

    Args:
        checkpoint: a safetensors file, quantized by StepQuant or not.
        dtype: of all modules; left out, fp32 on a CPU and fp16 elsewhere.
    Raises: FormatError if the file is missing or damaged; ModelError if it is not SDXL or lacks a part.
    """
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
    source = str(checkpoint)
    with open_tensor_file(checkpoint) as file:
        quantized = HEADER_KEY in file.metadata
    if quantized:
        model = read_model(checkpoint)
        if CONV_IN not in model.rest:
            raise FormatError(f"{source}: {CONV_IN} is missing. The file is incomplete; download or make it again.")
        pipeline = _build(model.extra, model.rest[CONV_IN], source, dtype)
        install_model(pipeline.unet, model, dtype, source)
    else:
        with open_checkpoint(checkpoint) as file:
            pipeline = _build(file, file[file.unet_prefix + CONV_IN], source, dtype)
            _fill_unet(pipeline.unet, file, dtype, source)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        module.eval().requires_grad_(False)
    return pipeline.to(device)


def load_unet(unet: UNet2DConditionModel, path: str | Path, dtype: torch.dtype) -> None:
    """Fill a UNet, also one on the meta device, from an unquantized checkpoint or UNet file in LDM names.

    Raises: FormatError if the file is missing or damaged; ModelError if it is not this UNet's architecture.
    """
    with open_checkpoint(path) as file:
        _fill_unet(unet, file, dtype, str(path))


def _fill_unet(unet: UNet2DConditionModel, file: TensorFile, dtype: torch.dtype, source: str) -> None:
    prefix = file.unet_prefix
    state = {UNET_PREFIX + name: _to_dtype(file[prefix + name], dtype) for name in file.unet_shapes()}
    try:
        renamed = unet_from_ldm(state)
    except UnknownUNetKey as error:
        raise ModelError(f"{source}: its UNet is not SDXL base's ({error}) {GIVE_BASE}") from None
    _fill(unet, renamed, source)


def _build(tensors: Mapping[str, Tensor], conv_in: Tensor, source: str, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """A pipeline with everything filled but the UNet, whose parameters are still on the meta device."""
    _check_parts(tensors, source)
    is_demo = any(key.startswith(VAE_PREFIX + "taesd_") for key in tensors)
    config = demo_architecture.read_config() if is_demo else _full_size_config()
    with init_empty_weights():
        unet = UNet2DConditionModel(**{**config["unet"], "in_channels": conv_in.shape[1]})
        encoder_l = CLIPTextModel(CLIPTextConfig(**config["text_encoder"]))
        encoder_g = CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"]))
    state_l, state_g = text_from_ldm(_converted(tensors, dtype, CLIP_L_PREFIX, CLIP_G_PREFIX))
    _fill(encoder_l, state_l, source)
    _fill(encoder_g, state_g, source)
    tokenizer_l, tokenizer_g = build_tokenizers()
    return StableDiffusionXLPipeline(
        vae=_build_demo_vae(tensors, dtype, source) if is_demo else _build_vae(tensors, dtype),
        text_encoder=encoder_l,
        text_encoder_2=encoder_g,
        tokenizer=tokenizer_l,
        tokenizer_2=tokenizer_g,
        unet=unet,
        scheduler=_build_scheduler(config["scheduler"], tensors),
        # SDXL's trainers zeroed a dropped caption; the demo model's encoded the empty one.
        force_zeros_for_empty_prompt=not is_demo,
        add_watermarker=False,
    )


def _full_size_config() -> dict[str, dict]:
    return {
        "unet": sdxl_config.UNET,
        "text_encoder": sdxl_config.TEXT_ENCODER_L,
        "text_encoder_2": sdxl_config.TEXT_ENCODER_G,
        "scheduler": sdxl_config.SCHEDULER,
    }


def _check_parts(tensors: Mapping[str, Tensor], source: str) -> None:
    parts = {"text encoder L": CLIP_L_PREFIX, "text encoder G": CLIP_G_PREFIX, "VAE": VAE_PREFIX}
    missing = [part for part, prefix in parts.items() if not any(key.startswith(prefix) for key in tensors)]
    if missing:
        raise ModelError(f"{source}: holds no {', no '.join(missing)}, so no picture can be made. Give a whole SDXL checkpoint.")


def _build_scheduler(config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> EulerDiscreteScheduler:
    config = dict(config)
    if V_PREDICTION_KEY in tensors:
        config["prediction_type"] = "v_prediction"
    if ZERO_SNR_KEY in tensors:
        # The last timestep carries the meaning of zero SNR; "leading" spacing would never visit it.
        config.update(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return EulerDiscreteScheduler(**config)


def _build_vae(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> AutoencoderKL:
    state = {key: tensors[key] for key in tensors if key.startswith(VAE_PREFIX)}
    with tempfile.TemporaryDirectory() as folder:
        with init_empty_weights():
            AutoencoderKL(**sdxl_config.VAE).save_config(folder)
        return AutoencoderKL.from_single_file(state, config=folder, torch_dtype=dtype, local_files_only=True)


def _build_demo_vae(tensors: Mapping[str, Tensor], dtype: torch.dtype, source: str) -> nn.Module:
    vae = demo_architecture.build_vae()
    _fill(vae, vae_from_ldm(_converted(tensors, dtype, VAE_PREFIX)), source)
    return vae


def _converted(tensors: Mapping[str, Tensor], dtype: torch.dtype, *prefixes: str) -> dict[str, Tensor]:
    return {key: _to_dtype(tensors[key], dtype) for key in tensors if key.startswith(prefixes)}


def _to_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _fill(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Give the module the checkpoint's tensors themselves; files carry a few tensors no module uses."""
    wanted = module.state_dict().keys()
    # transformers moved CLIP's parameters in and out of a `text_model.` child between releases.
    state = {key if key in wanted else f"text_model.{key}": value for key, value in state.items()}
    missing = [key for key in wanted if key not in state]
    wrong = [key for key, value in module.state_dict().items() if key in state and state[key].shape != value.shape]
    if missing or wrong:
        raise ModelError(
            f"{source}: {len(missing)} tensors missing and {len(wrong)} of another shape than SDXL's "
            f"(first: {(missing + wrong)[0]}). {GIVE_BASE}"
        )
    module.load_state_dict({key: state[key] for key in wanted}, strict=True, assign=True)
