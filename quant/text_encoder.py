"""SDXL's two text encoders in 8 bit, as ComfyUI's own int8 Linears: names, codes and the file. Runs no encoder.

Keys are those of ComfyUI's SDXLClipModel: `clip_l.transformer.text_model...` and `clip_g.transformer.text_model...`. The Linears of
the transformer layers have int8 codes and a scale per row. Everything else stays as it is: the token tables too, whose codes would
save another 96 MiB and cost 1.6 dB of the conditioning (38.8 instead of 40.4 on the demo model).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ModelError
from .atomic_file import save_tensors
from .native_format import FORMAT
from .safe_header import damaged, open_tensors
from .weight import quantize_weight

HEADER_KEY = "stepquant_text_encoders"
FORMAT_VERSION = 1
KIND = "a file of text encoders that StepQuant made"
CLIP_L, CLIP_G = "clip_l.transformer.", "clip_g.transformer."
# Of SDXL checkpoints; ComfyUI's own names, of a live CLIP, are the ones above.
CHECKPOINT_L, CHECKPOINT_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
# transformers' names of encoder G -> OpenCLIP's, which checkpoints have. Queries, keys and values are one tensor there.
CLIP_G_NAMES = {
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.out_proj.": ".attn.out_proj.",
}
QUANTIZED = re.compile(r"clip_[lg]\.transformer\.text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.weight")


def quantize_text_encoders(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors of both encoders with int8 codes where they have them, on the CPU.

    Args: tensors: by ComfyUI's names. source: for error messages.
    Raises: ModelError if an encoder is missing or 8 bit already; WeightError if a weight is not finite.
    """
    if any(key.endswith(".comfy_quant") for key in tensors):
        raise ModelError(f"{source}: these text encoders are quantized already. Give the 16-bit ones.")
    for prefix in (CLIP_L, CLIP_G):
        if not any(key.startswith(prefix) and QUANTIZED.fullmatch(key) for key in tensors):
            name = prefix.split(".")[0]
            raise ModelError(f"{source}: {name} is missing; SDXL has two text encoders. Give a whole SDXL checkpoint, or its CLIP.")
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not QUANTIZED.fullmatch(key):
            found[key] = tensor.detach().cpu().contiguous()
            continue
        layer, weight = key.removesuffix(".weight"), quantize_weight(tensor.detach(), key)
        found[key] = weight.codes.cpu()
        found[f"{layer}.weight_scale"] = weight.scale.view(-1, 1).cpu()
        found[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps({"format": FORMAT}).encode()), dtype=torch.uint8)
    return found


def from_checkpoint(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text encoders of an SDXL checkpoint by ComfyUI's names; the rest of it is not read. Empty if it has none."""
    found: dict[str, Tensor] = {}
    for key in tensors:
        if key.startswith(CHECKPOINT_L) and not key.endswith("position_ids"):
            found[CLIP_L + key.removeprefix(CHECKPOINT_L)] = tensors[key]
        elif key.startswith(CHECKPOINT_G):
            found.update(_from_open_clip(key.removeprefix(CHECKPOINT_G), tensors[key]))
    return found


def write_text_encoders(path: str | Path, tensors: Mapping[str, Tensor], library_version: str) -> None:
    """Write what quantize_text_encoders made, whole or not at all. Raises FormatError if the folder cannot be written."""
    header = {"version": FORMAT_VERSION, "library_version": library_version}
    save_tensors(path, dict(tensors), {HEADER_KEY: json.dumps(header), "format": "pt"})


def read_text_encoders(path: str | Path) -> dict[str, Tensor]:
    """A whole file. Raises FormatError naming it if it is missing, damaged, not ours or newer."""
    with open_tensors(path, HEADER_KEY, FORMAT_VERSION, KIND) as (_, file):
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safetensors' handle is no dict
    for key in filter(QUANTIZED.fullmatch, tensors):
        layer, codes = key.removesuffix(".weight"), tensors[key]
        scale, marker = (tensors.get(f"{layer}.{part}") for part in ("weight_scale", "comfy_quant"))
        if codes.dtype is not torch.int8 or codes.ndim != 2 or marker is None or scale is None or scale.shape != (len(codes), 1):
            raise damaged(path, f"{layer} has no int8 codes with a scale per row")
        if not bool(torch.isfinite(scale).all()) or _format_of(marker) != FORMAT:
            raise damaged(path, f"the scales of {layer} are not numbers, or of another format")
    return tensors


def _format_of(marker: Tensor) -> object:
    try:
        return json.loads(bytes(marker.tolist())).get("format")
    except (ValueError, AttributeError, TypeError):
        return None


def _from_open_clip(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of encoder G -> the same by ComfyUI's names."""
    if name == "logit_scale":
        return {"clip_g.logit_scale": tensor}
    if name == "text_projection":
        return {f"{CLIP_G}text_projection.weight": tensor.t().contiguous()}
    if ".attn.in_proj_" in name:
        ours = f"{CLIP_G}text_model.{name.replace('transformer.resblocks.', 'encoder.layers.')}"
        return {ours.replace("attn.in_proj_", f"self_attn.{part}_proj."): rows for part, rows in zip("qkv", tensor.chunk(3), strict=True)}
    for hf, open_clip in CLIP_G_NAMES.items():
        name = name.replace(open_clip, hf)
    return {f"{CLIP_G}text_model.{name}": tensor}
