"""A scale LoRA's file: one safetensors file of int8 logarithms and a JSON header. Knows no engine.

Keys: `out` and `into`, int8, the tables of ScaleSet one after the other, each row by row; `step` fp32, of each table in the same
order: log factor = step * code; `names`, uint8: JSON, deflated.
Full-size SDXL: 1.8 MB for one expert, 3.3 MB for two. A safetensors key for every table would add more than half to a small model's file.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ...errors import FormatError
from ..atomic_file import save_tensors
from ..safe_header import LARGEST_HEADER_BYTES, damaged, open_tensors, printable
from .scale_set import EXPERTS, LARGEST_LOG_FACTOR, ScaleSet, is_prompt_layer

HEADER_KEY = "stepquant_scale_lora"
FORMAT_VERSION = 1
KIND = "a StepQuant scale LoRA"
LARGEST_CODE = 127


def save_scale_set(scales: ScaleSet, path: str | Path, library_version: str) -> None:
    """Write the file, whole or not at all. Codes lose 0.4 % of a layer's largest log factor at most.

    Raises: FormatError if a factor is not finite, or the folder cannot be written.
    """
    tensors, steps = {}, []
    for part, table in (("out", scales.out), ("into", scales.into)):
        codes = []
        for name, logs in table.items():
            step = float(logs.abs().max()) / LARGEST_CODE if logs.numel() else 0.0
            if not step <= LARGEST_LOG_FACTOR / LARGEST_CODE:  # NaN too
                raise FormatError(
                    f"{name}: factors of e^{step * LARGEST_CODE:.1f}; training has diverged. Train again with a lower learning rate."
                )
            codes.append((logs / max(step, 1e-12)).round().to(torch.int8).flatten())
            steps.append(step)
        tensors[part] = torch.cat(codes) if codes else torch.zeros(0, dtype=torch.int8)
    names = [[name, logs.shape[1]] for table in (scales.out, scales.into) for name, logs in table.items()]
    packed = zlib.compress(json.dumps(names, separators=(",", ":")).encode(), 9)
    tensors |= {"step": torch.tensor(steps), "names": torch.frombuffer(bytearray(packed), dtype=torch.uint8)}
    header = {
        "version": FORMAT_VERSION,
        "library_version": library_version,
        "experts": scales.experts,
        "layers": len(scales.out),
        "base_model": scales.base,
        "summary": scales.summary,
    }
    save_tensors(path, tensors, {HEADER_KEY: json.dumps(header), "format": "pt"})


def load_scale_set(path: str | Path) -> ScaleSet:
    """Read and check a whole file. Raises FormatError naming the file if it is missing, damaged, not ours or newer."""
    with open_tensors(path, HEADER_KEY, FORMAT_VERSION, KIND) as (header, file):
        experts, layers = header.get("experts"), header.get("layers")
        if experts not in EXPERTS or type(layers) is not int:
            raise damaged(path, f"{printable(str(experts))} experts")
        if set(file.keys()) != {"out", "into", "step", "names"}:
            raise damaged(path, "its tensors are not those of a scale LoRA")
        tensors = {key: file.get_tensor(key) for key in ("out", "into", "step", "names")}
    names = _names(tensors["names"], path)
    if any(tensors[key].dtype is not torch.int8 for key in ("out", "into")) or tensors["step"].shape != (len(names),):
        raise damaged(path, "codes or steps of another kind")
    steps = tensors["step"].float()
    if not 0 <= layers <= len(names) or not bool(((steps >= 0) & (steps <= LARGEST_LOG_FACTOR / LARGEST_CODE * 1.001)).all()):
        raise damaged(path, "a step out of its range")
    out = _tables(tensors["out"], names[:layers], steps[:layers], experts, path)
    into = _tables(tensors["into"], names[layers:], steps[layers:], experts, path)
    return ScaleSet(experts, out, into, _table(header.get("base_model")), _table(header.get("summary")))


def _names(packed: Tensor, path: str | Path) -> list[tuple[str, int]]:
    """Inflates no further than a header may be long."""
    try:
        text = zlib.decompressobj().decompress(packed.numpy().tobytes(), LARGEST_HEADER_BYTES)
        names = json.loads(text)
        checked = [(name, width) for name, width in names if isinstance(name, str) and type(width) is int and width > 0]
    except (zlib.error, ValueError, TypeError, RecursionError):
        raise damaged(path, "the list of layers cannot be read") from None
    if len(checked) != len(names) or len(dict(checked)) != len(names):
        raise damaged(path, "the list of layers is no list of names and widths")
    return checked


def _tables(codes: Tensor, names: list[tuple[str, int]], steps: Tensor, experts: int, path: str | Path) -> dict[str, Tensor]:
    shapes = [(1 if is_prompt_layer(name) else experts, width) for name, width in names]
    sizes = [rows * width for rows, width in shapes]
    if codes.ndim != 1 or codes.numel() != sum(sizes):
        raise damaged(path, f"{codes.numel()} codes where {sum(sizes)} are listed")
    parts = codes.split(sizes)
    return {name: part.view(shape).float() * step for (name, _), part, shape, step in zip(names, parts, shapes, steps, strict=True)}


def _table(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}
