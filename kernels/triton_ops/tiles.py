"""Tile sizes of the GEMM and convolution kernels per GPU generation. Chosen from compiled code, not yet tuned by timing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Sizes of one program's output tile and K step, and its launch shape. BLOCK_K 64 divides every channel count of SDXL."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# Program tiles of this many rows of blocks run together, so that their weight tiles are still in L2.
GROUP_M = 8

# (sm // 10) -> tiles for M > 256, M > 32, and below. 8 warps at 128x128 on sm_8x: 4 would need 253 registers each.
_BY_GENERATION: dict[int, tuple[Tile, Tile, Tile]] = {
    8: (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4), Tile(16, 64, 128, 4, 4)),
    9: (Tile(128, 128, 128, 8, 3), Tile(64, 64, 128, 4, 4), Tile(16, 64, 128, 4, 4)),
}
_DEFAULT = _BY_GENERATION[8]
# Divides the channels of every tap in SDXL; a wider step is taken where it does too.
_CONV_BLOCK_K = 64
# Output channels that 128 does not divide but 64 does (320, 960): 64-wide tiles waste none.
_NARROW_N = 64


def gemm_tile(sm: int, M: int, N: int) -> Tile:
    """The tile of a (M, N) product on compute capability `sm`; 0 is Triton's interpreter or an unknown GPU."""
    large, medium, small = _BY_GENERATION.get(sm // 10, _DEFAULT)
    if M <= 32:
        return small
    return medium if M <= 256 or N <= 64 else large


def conv_tile(sm: int, M: int, N: int, C: int) -> Tile:
    """The tile of a convolution with M output pixels, N output channels and C input channels."""
    tile = gemm_tile(sm, max(M, 33), N)
    narrow = N % tile.BLOCK_N != 0 and N % _NARROW_N == 0
    block_k = tile.BLOCK_K if C % tile.BLOCK_K == 0 else _CONV_BLOCK_K
    return Tile(tile.BLOCK_M, _NARROW_N if narrow else tile.BLOCK_N, block_k, tile.num_warps, tile.num_stages)
