"""SDXL's layers by name: which are quantized, and what feeds them.

Names are SDXL's own (LDM) without the `model.diffusion_model.` prefix and without `.weight`,
for example `input_blocks.4.1.transformer_blocks.0.attn1.to_q`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ModelError

UNET_PREFIX = "model.diffusion_model."

# The first and last conv see and make the latent itself: together 26 % of SDXL-Turbo's A8 noise and 56 % of its
# W4 noise (MixDQ's sensitivity log). The embeddings are two rows per step, and ComfyUI reads the model's kind from them.
NEVER_QUANTIZED = ("input_blocks.0.0", "out.2", "time_embed", "label_emb")

# Their input is a SiLU or GEGLU output: never below -0.28, so a zero point buys almost one bit.
_ONE_SIDED_INPUT = re.compile(r"\.(in_layers\.2|out_layers\.3|emb_layers\.1|ff\.net\.2)$")
# The same, and read by a 3x3 conv, whose dynamic scales are per image: there the low end is known beforehand.
_ACTIVATED_CONV = re.compile(r"\.(in_layers\.2|out_layers\.3)$")
# What 4-bit weights cost most for their bytes: on the demo model the first two make 40 % of the noise of all 4-bit Linears with 5 % of
# their weights. MixDQ's plan of 5 bits (arXiv 2405.17873) leaves 8 to all of them in SDXL-Turbo too: 1.9 % of the Linears' weights.
_COSTLY_IN_4_BITS = re.compile(r"\.(proj_in|proj_out|emb_layers\.1)$")
SILU_LOW = -0.2784645427610738  # SiLU's one minimum, at x = -1.2784645427610738 where x + 1 + exp(x) = 0
# Prompt tokens: the start token's absmax is about 80 times that of the others, so each row keeps a scale of its own.
# Timestep embeddings: as many rows as images.
_ALWAYS_TOKEN = re.compile(r"\.(attn2\.to_[kv]|emb_layers\.1)$")
_PROMPT_READERS = re.compile(r"\.attn2\.to_[kv]$")


@dataclass(frozen=True)
class LayerSpec:
    """shape: (N, K) of a Linear or (Cout, Cin, kh, kw) of a conv."""

    name: str
    shape: tuple[int, ...]

    @property
    def is_conv(self) -> bool:
        return len(self.shape) == 4

    @property
    def in_channels(self) -> int:
        return self.shape[1]

    @property
    def sum_length(self) -> int:
        """Products that an output is the sum of: input channels, times the kernel's taps."""
        return math.prod(self.shape[1:])


def is_quantizable(name: str) -> bool:
    return not any(name == kept or name.startswith(kept + ".") for kept in NEVER_QUANTIZED)


def has_symmetric_input(name: str) -> bool:
    """False where the input is a SiLU, GELU or GEGLU output."""
    return _ONE_SIDED_INPUT.search(name) is None


def dynamic_low(name: str) -> float | None:
    """The lowest value that a layer's input can have where a dynamic scale can make use of it: of a 3x3 conv after SiLU; else None."""
    return SILU_LOW if _ACTIVATED_CONV.search(name) else None


def needs_row_scales(name: str) -> bool:
    """True where the input keeps dynamic per-token scales in every preset."""
    return _ALWAYS_TOKEN.search(name) is not None


def reads_prompt(name: str) -> bool:
    """True where the input's rows are the prompt's tokens."""
    return _PROMPT_READERS.search(name) is not None


def keeps_8_bits(name: str) -> bool:
    """True where 4-bit weights would save little and cost much."""
    return _COSTLY_IN_4_BITS.search(name) is not None


def gains_from_fp8(name: str) -> bool:
    """True where fp8 saves time: a feed-forward's second layer, as its input's range is wide and hard to know before it is computed.

    The layer before can write e4m3 codes with one scale that bounds all values (hosts/fused.py), where int8 needs a pass for the rows'
    scales. Other layers' products took as long in fp8 as in int8 on an H200 (convolutions 3.22 and 3.25 ms a step), with coarser
    codes: the demo model's UNet is at 39.2 dB in int8, 38.8 with these in fp8, 30.8 with all; ComfyUI's own fp8 is at 36.2.
    """
    return name.endswith(".ff.net.2")


def find_layers(shapes: Mapping[str, Sequence[int]]) -> dict[str, LayerSpec]:
    """The quantizable Linear and Conv2d layers of a UNet.

    Args:
        shapes: tensor name (LDM, without prefix) to shape.
    """
    layers = {}
    for key, shape in shapes.items():
        name = key.removesuffix(".weight")
        if name != key and len(shape) in (2, 4) and is_quantizable(name):
            layers[name] = LayerSpec(name, tuple(shape))
    return layers


def check_is_sdxl(shapes: Mapping[str, Sequence[int]], source: str) -> None:
    """Raise ModelError unless the shapes are those of an SDXL-like UNet in LDM names.

    `source` names the file or model in the message.
    """
    if any(key.endswith(".qweight") for key in shapes):
        raise ModelError(f"{source}: already quantized by StepQuant. Use Load quantized (StepQuant) to open it.")
    if any(key.startswith(("double_blocks.", "transformer_blocks.", "joint_blocks.")) for key in shapes):
        raise ModelError(f"{source}: a transformer model (Flux, SD3 or similar); StepQuant quantizes SDXL. Choose an SDXL model.")
    if "input_blocks.0.0.weight" not in shapes or "out.2.weight" not in shapes:
        raise ModelError(f"{source}: no SDXL UNet found. Choose an SDXL checkpoint or UNet file.")
    if "label_emb.0.0.weight" not in shapes:
        raise ModelError(f"{source}: an SD 1.x or 2.x UNet (no size conditioning); StepQuant quantizes SDXL. Choose an SDXL model.")
