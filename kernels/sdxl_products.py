"""Every quantized product of one SDXL UNet step at 1024x1024 with CFG (batch 2): shapes, counts, epilogues. No kernels.

Counted on the module graph of SDXL base; q, k and v of self-attention are one product. Tables are made for these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

BATCH = 2


@dataclass(frozen=True)
class SdxlProduct:
    """One role. op: as in tables.py. M, N: rows or output pixels (of a phase), output channels. K: channels of each segment.

    side: of the input, in pixels; 0 for a Linear. count: calls a step. bias, addend: "image" (time embedding) or "residual",
    asymmetric: the input may have a zero point (SiLU, GEGLU), epilogue of the role. cached: not computed in every step.
    variant: another way to carry out a role that is listed too, and so not part of a step's total.
    """

    role: str
    op: str
    M: int
    N: int
    K: tuple[int, ...]
    count: int
    bias: bool = True
    addend: str = ""
    asymmetric: bool = False
    side: int = 0
    cached: bool = False
    variant: bool = False

    @property
    def operations(self) -> float:
        """Multiplications and additions of one call."""
        taps = {"gemm": 1, "geglu": 1, "conv1x1": 1, "upsample2x": 16}.get(self.op, 9)
        return 2.0 * self.M * self.N * sum(self.K) * taps


def _linears(M: int, C: int, blocks: int, transformers: int) -> list[SdxlProduct]:
    """The Linears of one level: C channels, `blocks` transformer blocks in `transformers` spatial transformers."""
    return [
        SdxlProduct("self q,k,v", "gemm", M, 3 * C, (C,), blocks, bias=False),
        SdxlProduct("cross q", "gemm", M, C, (C,), blocks, bias=False),
        SdxlProduct("attention out", "gemm", M, C, (C,), 2 * blocks, addend="residual"),
        SdxlProduct("proj_in", "gemm", M, C, (C,), transformers),
        SdxlProduct("proj_out", "gemm", M, C, (C,), transformers, addend="residual"),
        SdxlProduct("ff1", "gemm", M, 8 * C, (C,), blocks),
        SdxlProduct("ff1 with GEGLU", "geglu", M, 8 * C, (C,), blocks, variant=True),
        SdxlProduct("ff2", "gemm", M, C, (4 * C,), blocks, addend="residual", asymmetric=True),
        SdxlProduct("cross k,v", "gemm", 154, C, (2048,), 2 * blocks, bias=False, cached=True),
    ]


def _shortcut(side: int, N: int, K: tuple[int, ...], count: int = 1) -> SdxlProduct:
    return SdxlProduct("shortcut", "gemm", BATCH * side * side, N, K, count)


def _conv(side: int, N: int, K: tuple[int, ...], count: int, addend: str = "image") -> SdxlProduct:
    return SdxlProduct("conv", "conv3x3", BATCH * side * side, N, K, count, addend=addend, asymmetric=True, side=side)


def _downsample(side: int, C: int) -> SdxlProduct:
    return SdxlProduct("downsample", "conv3x3_stride2", BATCH * side * side // 4, C, (C,), 1, side=side)


def _upsample(side: int, C: int) -> Iterator[SdxlProduct]:
    """As hosts run it, on the doubled image, and as four phases, whose summed weights would be rounded a second time."""
    yield SdxlProduct("upsample", "conv3x3", BATCH * 4 * side * side, C, (C,), 1, side=2 * side)
    yield SdxlProduct("upsample by phases", "upsample2x", BATCH * side * side, C, (C,), 1, side=side, variant=True)


def _joined_or_not(*products: SdxlProduct) -> Iterator[SdxlProduct]:
    """What reads a skip-concat: as hosts run it, on the joined tensor, and with its two parts as segments."""
    for product in products:
        yield replace(product, K=(sum(product.K),))
        yield replace(product, variant=True)


PRODUCTS: tuple[SdxlProduct, ...] = (
    *_linears(2048, 1280, 60, 6),
    *_linears(8192, 640, 10, 5),
    *(SdxlProduct("embedding", "gemm", BATCH, N, (1280,), count, cached=True) for N, count in ((1280, 7), (640, 5), (320, 5))),
    _shortcut(64, 640, (320,)), _shortcut(32, 1280, (640,)),
    *_joined_or_not(
        _shortcut(32, 1280, (1280, 1280), 2), _shortcut(32, 1280, (1280, 640)), _shortcut(64, 640, (1280, 640)),
        _shortcut(64, 640, (640, 640)), _shortcut(64, 640, (640, 320)), _shortcut(128, 320, (640, 320)), _shortcut(128, 320, (320, 320), 2),
    ),
    # The first convolution of a block adds the time embedding, the second the block's input.
    _conv(32, 1280, (1280,), 3), _conv(32, 1280, (1280,), 7, "residual"),
    _conv(64, 640, (640,), 1), _conv(64, 640, (640,), 5, "residual"),
    _conv(128, 320, (320,), 2), _conv(128, 320, (320,), 5, "residual"),
    _conv(64, 640, (320,), 1), _conv(32, 1280, (640,), 1),
    *_joined_or_not(
        _conv(32, 1280, (1280, 1280), 2), _conv(32, 1280, (1280, 640), 1), _conv(64, 640, (1280, 640), 1), _conv(64, 640, (640, 640), 1),
        _conv(64, 640, (640, 320), 1), _conv(128, 320, (640, 320), 1), _conv(128, 320, (320, 320), 2),
    ),
    _downsample(128, 320), _downsample(64, 640), *_upsample(32, 1280), *_upsample(64, 640),
)  # fmt: skip
