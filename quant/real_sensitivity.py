"""What stays 16 bit when nobody calibrates: the layers that real SDXL weights showed to be the worst. Measures nothing.

SQNR of SDXL-Turbo's output with one layer's input in 8 bits, from the sensitivity published with MixDQ (arXiv 2405.17873): one
step, 512 px, 32 prompts, one static min-max scale per tensor. The median of all 794 layers is 77 dB.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

# The six worst of the layers that are quantized at all: 25 % of all 8-bit activation noise in 1.4 % of the multiply-adds at 1024 px.
# The seventh, at 51.2 dB, makes a quarter of the first's noise.
SDXL_WORST_DB: Mapping[str, float] = {
    "input_blocks.8.1.transformer_blocks.6.ff.net.2": 45.6,
    "input_blocks.8.1.transformer_blocks.7.ff.net.2": 46.3,
    "output_blocks.0.1.transformer_blocks.0.ff.net.2": 46.7,
    "input_blocks.8.1.transformer_blocks.4.ff.net.2": 47.1,
    "input_blocks.8.1.transformer_blocks.5.ff.net.2": 47.8,
    "input_blocks.8.1.transformer_blocks.8.ff.net.2": 49.2,
}


def kept_16_bit(layers: Collection[str]) -> frozenset[str]:
    """Names of layers that an uncalibrated recipe leaves 16 bit; none in a model that is not of SDXL's depth."""
    return frozenset(SDXL_WORST_DB) if set(SDXL_WORST_DB) <= set(layers) else frozenset()
