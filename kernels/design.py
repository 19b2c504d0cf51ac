"""How a product is cut into tiles, and the choice that holds where no tuned table says otherwise. Tables: tables.py."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import FormatError

# Boxes of output pixels that a convolution with tensor descriptors makes at a time, by BLOCK_M: (rows, columns).
# They divide SDXL's sides (128, 64, 32 at 1024x1024); at other sizes the part outside the image is computed in vain.
BOXES = {64: (8, 8), 128: (8, 16), 256: (16, 16)}
# A convolution computes at most this many times its output pixels in boxes, else pixels are taken in order.
MAX_BOX_WASTE = 1.15
TRITON, SCALED_MM, EXPANDED, GLUON = BACKENDS = "triton", "scaled_mm", "expanded", "gluon"


@dataclass(frozen=True)
class Design:
    """One way to carry out a product.

    BLOCK_M, BLOCK_N, BLOCK_K: output tile and step along K; BLOCK_K 64 divides every channel count of SDXL.
    rest_n: columns of the same tile beyond BLOCK_N, as a second block of sums; tma only. Triton's blocks are powers of two, but
        128 + 32 columns cut SDXL's 1280, 640 and 320 without waste, and (2048, 1280) into 128 tiles for 132 multiprocessors.
    num_warps, num_stages: Triton's launch shape and pipeline depth.
    group_m: this many rows of tiles run together, so that their weight tiles are still in L2.
    tma: operands come through tensor descriptors (sm_90 and newer). split_k: programs per tile, each a part of K.
    persistent: as many programs as multiprocessors, each takes tile after tile.
    backend: "triton", or "scaled_mm" for torch._scaled_mm (fp8 GEMM only), or "expanded" (4-bit weights only): their int8 codes are
        written out first, and the product is int8_gemm's, by its own table. With either the sizes are meaningless. "gluon": the
        kernels of gluon_ops, where they serve the operands; else Triton's with the same sizes but for the rest.
    Raises: FormatError if the parts contradict each other.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    tma: bool = False
    split_k: int = 1
    persistent: bool = False
    backend: str = TRITON
    rest_n: int = 0

    def __post_init__(self) -> None:
        sizes = (self.BLOCK_M, self.BLOCK_N, self.BLOCK_K, self.num_warps, self.rest_n or 1)
        powers = all(isinstance(size, int) and size > 0 and size & (size - 1) == 0 for size in sizes)
        counts = all(isinstance(count, int) and count > 0 for count in (self.num_stages, self.group_m, self.split_k))
        if not powers or not counts or self.backend not in BACKENDS or (self.persistent and self.split_k > 1):
            raise FormatError(
                f"kernel design {self}: sizes and warps must be powers of two, counts positive, backend one of {', '.join(BACKENDS)}, "
                "and a persistent design not split. Correct the table, or delete it to use the defaults."
            )

    @property
    def columns(self) -> int:
        """Output columns of a tile."""
        return self.BLOCK_N + self.rest_n

    @property
    def sums_per_thread(self) -> int:
        """Registers that a tile's sums take."""
        return self.BLOCK_M * self.columns // (32 * self.num_warps)

    @property
    def label(self) -> str:
        """A short name, unique: "128x256x128 w8 s3 tma"."""
        if self.backend not in (TRITON, GLUON):
            return self.backend
        columns = f"{self.BLOCK_N}+{self.rest_n}" if self.rest_n else self.BLOCK_N
        parts = [f"{self.BLOCK_M}x{columns}x{self.BLOCK_K} w{self.num_warps} s{self.num_stages}"]
        parts += [f"g{self.group_m}"] if self.group_m != 8 else []
        parts += ["tma"] if self.tma else []
        parts += [f"split{self.split_k}"] if self.split_k > 1 else []
        parts += ["persistent"] if self.persistent else []
        parts += ["gluon"] if self.backend == GLUON else []
        return " ".join(parts)


# (sm // 10) -> designs for M > 256, M > 32, and below. 8 warps on sm_8x: 4 would need 253 registers each at 128x128, and spill
# at 64x64 with Triton 3.9.
_BY_GENERATION: dict[int, tuple[Design, Design, Design]] = {
    8: (Design(128, 128, 64, 8, 3), Design(64, 64, 64, 8, 3), Design(16, 64, 128, 4, 4)),
    9: (Design(128, 128, 128, 8, 3), Design(64, 64, 128, 4, 4), Design(16, 64, 128, 4, 4)),
}
_DEFAULT = _BY_GENERATION[8]
# Divides the channels of every tap in SDXL; a wider step is taken where it does too.
_CONV_BLOCK_K = 64
# Output channels that 128 does not divide but 64 does (320, 960): 64-wide tiles waste none.
_NARROW_N = 64


def default_gemm_design(sm: int, M: int, N: int) -> Design:
    """For an (M, N) product on compute capability `sm`; 0 is Triton's interpreter or an unknown GPU."""
    large, medium, small = _BY_GENERATION.get(sm // 10, _DEFAULT)
    if M <= 32:
        return small
    return medium if M <= 256 or N <= 64 else large


def default_conv_design(sm: int, M: int, N: int, C: int) -> Design:
    """For a convolution with M output pixels, N output channels and C input channels."""
    design = default_gemm_design(sm, max(M, 33), N)
    narrow = N % design.BLOCK_N != 0 and N % _NARROW_N == 0
    block_k = design.BLOCK_K if C % design.BLOCK_K == 0 else _CONV_BLOCK_K
    return Design(design.BLOCK_M, _NARROW_N if narrow else design.BLOCK_N, block_k, design.num_warps, design.num_stages)


def box_waste(design: Design, H: int, W: int) -> float:
    """Pixels computed per pixel of an H x W output if it is cut into this design's boxes; infinite without one."""
    if design.BLOCK_M not in BOXES:
        return float("inf")
    rows, columns = BOXES[design.BLOCK_M]
    return (-(-H // rows) * rows) * (-(-W // columns) * columns) / (H * W)
