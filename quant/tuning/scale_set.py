"""Factors on the scales of a quantized UNet, one set per timestep expert. Files are in scale_file.py, training in hosts/.

W = scale * out[e] * codes * into[e], e = floor(t * E / 1000): the separable in and out scales of TuneQDM (arXiv 2401.04339),
with these differences: factors start at 1 on scales that already fit; `into` belongs to the norm that the layers read, so that
layers which read one tensor share it and it costs nothing at run time; where a layer's input is another layer's output (attention,
GEGLU), that layer's `out` does the same; convolutions and embeddings have `out` alone; and keys and values of cross-attention
have one expert, for they are computed once per prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import FormatError
from ..timestep import NUM_BUCKETS

# More than four sets were worse in the paper (E = 2 is its best, E = 4 overfits); every one must start at a bucket.
EXPERTS = (1, 2, 4)
_PROMPT_LAYER = re.compile(r"\.attn2\.to_[kv]$")
# A transformer block's LayerNorms, and the GroupNorm before proj_in: what follows is linear in them.
_NORM = re.compile(r"^((input|output)_blocks\.\d+|middle_block)\.\d+\.(norm|transformer_blocks\.\d+\.norm[123])$")
# Beyond e^2 a factor is no fine tuning any more: a damaged file, or a training that ran away.
LARGEST_LOG_FACTOR = 2.0


@dataclass(eq=False)
class ScaleSet:
    """Natural logarithms of the factors, fp32: a strength multiplies them, sets that are stacked add up.

    out: layer -> (E, N), or (1, N) of a layer that all experts share. into: norm -> (E, K).
    base: what tells the model that they were tuned on (identity.py). summary: how they were trained, for people.
    """

    experts: int
    out: dict[str, Tensor]
    into: dict[str, Tensor]
    base: dict[str, object] = field(default_factory=dict)
    summary: dict[str, object] = field(default_factory=dict)

    @property
    def values(self) -> int:
        return sum(tensor.numel() for table in (self.out, self.into) for tensor in table.values())


def is_prompt_layer(name: str) -> bool:
    """Whether a layer reads the prompt alone, so that its result is kept for a whole run."""
    return _PROMPT_LAYER.search(name) is not None


def is_scaled_norm(name: str) -> bool:
    """Whether a norm, by its LDM name, has factors."""
    return _NORM.match(name) is not None


def new_scale_set(layers: Mapping[str, int], norms: Mapping[str, int], experts: int) -> ScaleSet:
    """Factors of 1. layers: name -> output channels. norms: name -> channels.

    Raises: FormatError if so many experts are not known.
    """
    if experts not in EXPERTS:
        raise FormatError(f"experts: {experts}; one of {', '.join(map(str, EXPERTS))} is needed. Usual is 1 or 2.")
    out = {name: torch.zeros(1 if is_prompt_layer(name) else experts, width) for name, width in layers.items()}
    return ScaleSet(experts, out, {name: torch.zeros(experts, width) for name, width in norms.items()})


def expert_of(bucket: Tensor, experts: int) -> Tensor:
    """The set that each timestep bucket uses: int64 in [0, experts), of bucket's shape."""
    return bucket * experts // NUM_BUCKETS


def stacked(sets: Iterable[tuple[ScaleSet, float]]) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """Several sets with their strengths as one: experts, and the factors (not their logarithms) of `out` and of `into`, fp32 (E, width).

    Raises: FormatError naming the layer if two sets give it different widths.
    """
    pairs = list(sets)
    experts = max((one.experts for one, _ in pairs), default=1)
    out: dict[str, Tensor] = {}
    into: dict[str, Tensor] = {}
    for one, strength in pairs:
        for table, target in ((one.out, out), (one.into, into)):
            for name, logs in table.items():
                _add(target, name, _spread(logs, experts) * strength)
    return experts, {name: logs.exp() for name, logs in out.items()}, {name: logs.exp() for name, logs in into.items()}


def _add(target: dict[str, Tensor], name: str, logs: Tensor) -> None:
    known = target.get(name)
    if known is not None and known.shape != logs.shape:
        raise FormatError(f"{name}: {known.shape[1]} factors in one scale LoRA, {logs.shape[1]} in another. Stack files of one model.")
    target[name] = logs if known is None else known + logs


def _spread(logs: Tensor, experts: int) -> Tensor:
    """(E', width) -> (experts, width), E' dividing experts: an expert's span is cut into equal ones."""
    return logs.float().repeat_interleave(experts // logs.shape[0], 0)
