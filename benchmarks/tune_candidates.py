"""The designs that tune.py tries for a product on an architecture. Which of them is best is measured there."""

from __future__ import annotations

from stepquant.kernels.design import BOXES, GLUON, SCALED_MM, Design
from stepquant.kernels.sdxl_products import SdxlProduct

# Sums of two segments, or of one and its epilogue's operands, that a thread can hold.
MAX_CONCAT_SUMS = 64
# Fewer tiles of 128 x 128 than this leave multiprocessors idle in the last wave of a large GPU: splitting K may pay.
SPLIT_BELOW_TILES = 320
SMALL_M = 256

_HOPPER = (
    Design(128, 256, 128, 8, 3, tma=True),
    Design(128, 256, 64, 8, 4, tma=True),
    Design(256, 128, 128, 8, 3, tma=True),
    Design(128, 128, 128, 8, 3, tma=True),
    Design(128, 128, 128, 8, 4, tma=True),
    Design(128, 128, 128, 4, 4, tma=True),
    Design(128, 128, 64, 8, 4, tma=True),
    Design(64, 256, 128, 4, 3, tma=True),
    Design(128, 64, 128, 4, 4, tma=True),
    Design(256, 64, 64, 8, 4, tma=True),
    Design(128, 256, 128, 8, 3, tma=True, persistent=True),
    Design(128, 256, 128, 8, 3, group_m=16, tma=True),
    Design(128, 128, 128, 8, 3),
    # Two or three programs on a multiprocessor, so that one's epilogue and first loads run under another's products.
    Design(128, 128, 128, 8, 3, group_m=4, tma=True),
    Design(128, 128, 128, 8, 3, group_m=16, tma=True),
    Design(128, 128, 128, 8, 2, tma=True),
    Design(128, 128, 64, 8, 5, tma=True),
    Design(128, 128, 64, 8, 6, tma=True),
    Design(64, 128, 128, 4, 3, tma=True),
    Design(64, 128, 128, 4, 4, tma=True),
    Design(128, 64, 128, 4, 3, tma=True),
    Design(128, 64, 128, 8, 4, tma=True),
    Design(64, 64, 128, 4, 4, tma=True),
    Design(256, 64, 128, 8, 3, tma=True),
    # One large program of four warp groups, which share what they load.
    Design(256, 128, 128, 16, 3, tma=True),
    Design(128, 128, 128, 16, 3, tma=True),
    Design(128, 128, 128, 8, 3, tma=True, persistent=True),
)
_HOPPER_SPLIT = (
    Design(128, 256, 128, 8, 3, tma=True, split_k=2),
    Design(128, 256, 128, 8, 3, tma=True, split_k=3),
    Design(128, 128, 128, 8, 3, tma=True, split_k=2),
    Design(256, 128, 128, 8, 3, tma=True, split_k=2),
)
_AMPERE = (
    Design(128, 128, 64, 8, 3),
    Design(128, 128, 64, 8, 4),
    Design(128, 128, 128, 8, 3),
    Design(128, 256, 64, 8, 3),
    Design(256, 128, 64, 8, 3),
    Design(128, 64, 64, 4, 4),
    Design(128, 64, 64, 8, 3),
    Design(64, 128, 64, 4, 4),
    Design(64, 64, 64, 4, 4),
    Design(128, 128, 64, 8, 3, group_m=4),
)
_AMPERE_SPLIT = (Design(128, 128, 64, 8, 3, split_k=2), Design(128, 256, 64, 8, 3, split_k=2))
_SMALL = (
    Design(16, 64, 128, 4, 4),
    Design(64, 64, 128, 4, 4),
    Design(64, 64, 64, 4, 4),
    Design(64, 128, 128, 4, 4),
    Design(64, 64, 128, 4, 4, split_k=2),
)
# Two programs on a multiprocessor, or one whose 128 + 32 columns leave few multiprocessors idle.
_HOPPER_GLUON = (
    Design(128, 128, 128, 8, 3, backend=GLUON),
    Design(128, 128, 128, 8, 3, backend=GLUON, rest_n=32),
    Design(128, 128, 128, 4, 4, backend=GLUON, rest_n=32),
    Design(64, 128, 128, 4, 3, backend=GLUON, rest_n=32),
)
# GEGLU's two groups of warps share a multiprocessor, num_warps each.
_HOPPER_GLUON_GATED = (
    Design(128, 128, 128, 8, 5, backend=GLUON),
    Design(128, 128, 128, 8, 6, backend=GLUON),
    Design(128, 128, 128, 4, 6, backend=GLUON),
)
# A convolution's sums are long: deep stages pay where there is a program for each multiprocessor.
_HOPPER_CONV = (
    *_HOPPER_GLUON,
    Design(128, 128, 128, 8, 3, group_m=4, backend=GLUON, rest_n=32),
    Design(128, 128, 128, 8, 3, group_m=4, backend=GLUON),
    Design(128, 128, 128, 8, 6, backend=GLUON, rest_n=32),
    Design(64, 128, 128, 4, 5, backend=GLUON, rest_n=32),
    Design(64, 128, 128, 4, 4, backend=GLUON),
    Design(128, 128, 128, 8, 3, tma=True, rest_n=32),
    Design(128, 128, 64, 8, 4, tma=True, rest_n=32),
    Design(64, 128, 128, 4, 3, tma=True, rest_n=32),
)
_LIBRARY = Design(128, 128, 128, 8, 3, backend=SCALED_MM)


def candidates(product: SdxlProduct, dtype: str, sm: int) -> list[Design]:
    """Designs worth compiling, the likely ones first."""
    if product.M <= SMALL_M:
        return [*_SMALL]
    hopper = sm >= 90
    found = [*(_HOPPER if hopper else _AMPERE)]
    if hopper and sm >= 120:
        found += _AMPERE
    is_concat = len(product.K) > 1
    if not is_concat and product.M * product.N < SPLIT_BELOW_TILES * 128 * 128:
        found += _HOPPER_SPLIT if hopper else _AMPERE_SPLIT
    if is_concat:
        found = [design for design in found if design.sums_per_thread <= MAX_CONCAT_SUMS and not design.persistent]
    if product.op == "conv3x3_stride2":
        found = [design for design in found if not design.tma] + ([Design(128, 64, 64, 8, 4)] if hopper else [])
    elif product.op == "geglu":
        found = [design for design in found if not design.persistent and design.split_k == 1]
    elif product.op != "gemm":
        found = [design for design in found if not design.tma or design.BLOCK_M in BOXES]
    if sm // 10 == 9 and not is_concat:
        found = [*{"gemm": _HOPPER_GLUON, "geglu": _HOPPER_GLUON_GATED, "conv3x3": _HOPPER_CONV}.get(product.op, ()), *found]
    if product.N % 256:
        found = [design for design in found if design.BLOCK_N < 256 or product.N > 512]
    if dtype == "fp8" and product.op == "gemm" and not is_concat:
        found.append(_LIBRARY)
    return list(dict.fromkeys(found))
