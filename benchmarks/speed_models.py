"""What benchmarks/speed.py runs: a random SDXL in every mode, and one call of its UNet. Times nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TINY_FOLDER = Path(__file__).resolve().parents[1] / "tests" / "comfyui"


@dataclass(frozen=True)
class Size:
    """latent: side of the latent. context, adm: widths of the prompt's tokens and of the vector input. tokens: of the prompt."""

    name: str
    latent: int
    context: int
    adm: int
    pooled: int
    tokens: int = 77


SDXL = Size("SDXL base UNet, random weights, 1024x1024, CFG batch 2", 128, 2048, 2816, 1280)
TINY = Size("tiny SDXL UNet for tests", 8, 128, 1600, 64)


def write_source(path: Path, tiny: bool) -> None:
    """The fp16 UNet that every mode is made of."""
    if not tiny:
        from dynamic_vram import write_random_sdxl

        write_random_sdxl(path)
        return
    register_tiny()
    import tiny_sdxl

    tiny_sdxl.write_unet(path)


def register_tiny() -> None:
    """Make ComfyUI know the architecture of the tests' small model."""
    if str(TINY_FOLDER) not in sys.path:
        sys.path.append(str(TINY_FOLDER))
    import tiny_sdxl

    tiny_sdxl.register()


class UNetCall:
    """One UNet call with CFG, as ComfyUI's sampler makes it from the second step on: the prompt is known from the first."""

    def __init__(self, size: Size, device: str, dtype: Any) -> None:
        import torch

        from stepquant.hosts.comfy.kv_cache import OPTION, Conditionings

        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.x = random(2, 4, size.latent, size.latent)
        self._context, self._y = random(2, size.tokens, size.context), random(2, size.adm)
        self._timesteps = torch.full((2,), 601.0, device=device)
        noted = Conditionings({"positive": 1, "negative": 2}, None)
        self._options = {"cond_or_uncond": [1, 0], "uuids": ["negative", "positive"], OPTION: noted}

    def on(self, patcher: Any, channels_last: bool = False, ours: bool = False) -> Callable[[], Any]:
        """The call as a function without arguments. The weights must be loaded. ours: with what ComfyUI's sampler notes for us."""
        import torch

        unet = patcher.model.diffusion_model
        x = self.x.to(memory_format=torch.channels_last) if channels_last else self.x
        options = self._options if ours else {}
        return lambda: unet(x, self._timesteps, context=self._context, y=self._y, transformer_options=dict(options))


def load_fp16(source: Path) -> Any:
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(source))


def load_channels_last(source: Path) -> Any:
    import torch

    patcher = load_fp16(source)
    patcher.model.diffusion_model.to(memory_format=torch.channels_last)
    return patcher


def load_native(source: Path, device: str, number_format: str) -> Any:
    """ComfyUI's own 8 bit (comfy-kitchen): every Linear that we quantize; convolutions stay fp16.

    number_format: int8_tensorwise, one scale per row, or float8_e4m3fn, one per weight. Inputs are quantized as it does by itself.
    """
    import comfy.sd
    import torch
    from comfy.quant_ops import QUANT_ALGOS, get_layout_class
    from safetensors.torch import load_file

    from stepquant.quant.layers import find_layers

    prefix = "model.diffusion_model."
    layout = get_layout_class(QUANT_ALGOS[number_format]["comfy_tensor_layout"])
    options = {"int8_tensorwise": {"per_channel": True}, "float8_e4m3fn": {"scale": "recalculate"}}[number_format]
    tensors = {key.removeprefix(prefix): tensor for key, tensor in load_file(str(source)).items()}
    marker = torch.tensor(list(json.dumps({"format": number_format}).encode()), dtype=torch.uint8)
    for name, layer in find_layers({key: tensor.shape for key, tensor in tensors.items()}).items():
        if not layer.is_conv:
            codes, params = layout.quantize(tensors[f"{name}.weight"].to(device), **options)
            tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = codes.cpu(), params.scale.cpu()
            tensors[f"{name}.comfy_quant"] = marker.clone()
    return comfy.sd.load_diffusion_model_state_dict(tensors)


def load_sdnq(source: Path, device: str, convs: bool) -> Any:
    """SDNQ (PyPI `sdnq`) in int8 with its integer products: all Linears, with `convs` the convolutions too."""
    from sdnq import sdnq_post_load_quant

    patcher = load_fp16(source)
    unet = patcher.model.diffusion_model.to(device)
    patcher.model.diffusion_model = sdnq_post_load_quant(
        unet, weights_dtype="int8", use_quantized_matmul=True, quant_conv=convs, use_quantized_matmul_conv=convs, add_skip_keys=False
    )
    return patcher


def conditioning(size: Size, seed: int) -> list:
    """A ComfyUI conditioning of random values."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, size.tokens, size.context, generator=generator)
    return [[tokens, {"pooled_output": torch.randn(1, size.pooled, generator=generator)}]]


def calibrate_source(patcher: Any, size: Size) -> Any:
    """Two steps are enough for tables: random weights make no picture to lose."""
    import torch

    from stepquant.hosts.comfy.calibrate import calibrate
    from stepquant.hosts.comfy.sampling import SamplerSettings

    latent = {"samples": torch.zeros(1, 4, size.latent, size.latent)}
    settings = SamplerSettings(2, 4.0, "euler", "normal")
    return calibrate(patcher, conditioning(size, 1), conditioning(size, 2), latent, 1, settings)


def random_vae() -> Any:
    """SDXL's VAE with random weights: what decodes a picture between two samplings."""
    import comfy.sd
    import torch
    from comfy.ldm.models.autoencoder import AutoencoderKL

    layout = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in AutoencoderKL(ddconfig=layout, embed_dim=4).state_dict().items()}
    generator = torch.Generator().manual_seed(4)
    return comfy.sd.VAE(sd={key: torch.randn(shape, generator=generator) * 0.02 for key, shape in shapes.items()})
