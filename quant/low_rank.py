"""A low-rank branch beside 4-bit codes, W ≈ codes + up down, and how the codes and the branch are fitted to each other.

Both are judged by the error of the layer's output, E(D) = tr(D H D^T) with H = X^T X of calibration rows, the measure that GPTQ rounds
by: the best branch for what codes leave over, D, is its projection on the first eigenvectors of D H D^T.
Source: SVDQuant (arXiv 2411.05007), section 4. Differences: it takes the branch from W by plain SVD, rounds what is left and repeats;
here the SVD is weighted by H, the branch is also fitted last, to the error of the codes, and the better of both ways is kept. Its
smoothing is left out: it moves outliers of 4-bit activations into weights, and activations have 8 bits here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import CalibrationError, WeightError
from .int4 import Int4Weight
from .scheme import MAX_RANK

# Rounds of codes from each start. The second one gained 0.4 dB over the first on the demo model's Linears, a third 0.1.
ROUNDS = 2
STARTS = 2
# Subspace iteration: what is cut off falls by the ratio of eigenvalues at each pass.
PASSES, MORE_COLUMNS = 6, 8
# Of the Hessian's mean diagonal, as gptq.DAMPING: directions that the calibration rows hardly used count too.
DAMPING = 0.1


@dataclass(frozen=True)
class LowRank:
    """down: (R, K) fp16, reads the layer's input. up: (N, R) fp16. The branch adds up(down(x)) to the layer's output."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def dense(self) -> Tensor:
        """(N, K) fp32."""
        return self.up.float() @ self.down.float()

    def to(self, device: torch.device) -> LowRank:
        return LowRank(self.down.to(device), self.up.to(device))


def low_rank_bytes(shape: tuple[int, ...], rank: int) -> int:
    """Of a branch beside a weight (N, K), in a file and in memory."""
    return 2 * rank * (shape[0] + shape[1])


def int4_beside_low_rank(
    weight: Tensor, rank: int, layer: str, rounded: Callable[[Tensor], Int4Weight], hessian: Tensor | None = None
) -> Int4Weight:
    """4-bit codes and the branch beside them that together lose least of the layer's output.

    Args:
        weight: (N, K), any float dtype; left unchanged.
        rounded: a weight (N, K) fp32 -> its codes; called STARTS * ROUNDS times.
        hessian: (K, K) fp32, sum over calibration rows x of x x^T, any positive factor; None to count all channels the same.
    Raises: WeightError if the rank is more than the weight has; CalibrationError if the Hessian is not (K, K) or not finite; what
        `rounded` raises.
    """
    N, K = weight.shape
    if not 0 < rank <= min(N, K, MAX_RANK):
        raise WeightError(f"{layer}: a branch of rank {rank} beside a weight {(N, K)}; 1 to {min(N, K, MAX_RANK)} fits. Choose that.")
    if hessian is not None and (tuple(hessian.shape) != (K, K) or not bool(torch.isfinite(hessian).all())):
        raise CalibrationError(
            f"{layer}: a Hessian of shape {tuple(hessian.shape)}, or not finite, for {K} input channels. Calibrate this model again."
        )
    weight = weight.detach().float()
    counts = torch.eye(K, device=weight.device) if hessian is None else _damped(hessian.to(weight.device).float())
    best, least = None, float("inf")
    for branch in (None, low_rank(weight, rank, counts)):
        for _ in range(ROUNDS):
            codes = rounded(weight if branch is None else weight - branch.dense())
            left = weight - codes.dequantize()
            branch = low_rank(left, rank, counts)
            error = left - branch.dense()
            found = float(((error @ counts) * error).sum())
            if found < least:
                best, least = replace(codes, branch=branch), found
    return best


def low_rank(matrix: Tensor, rank: int, counts: Tensor) -> LowRank:
    """The branch nearest to a matrix.

    Args: matrix: (N, K) fp32. counts: (K, K) fp32, positive: what errors of the input channels count together.
    """
    generator = torch.Generator().manual_seed(rank)
    columns = min(rank + MORE_COLUMNS, *matrix.shape)
    basis = matrix @ torch.randn(matrix.shape[1], columns, generator=generator).to(matrix.device)
    for _ in range(PASSES):
        basis = torch.linalg.qr(basis).Q
        basis = matrix @ (counts @ (matrix.t() @ basis))
    basis = torch.linalg.qr(basis).Q  # (N, columns)
    seen = basis.t() @ matrix
    _, directions = torch.linalg.eigh(seen @ counts @ seen.t())  # ascending
    up = basis @ directions[:, -rank:].flip(1)
    up = up.half().contiguous()
    # Of the `up` that is stored.
    return LowRank((up.float().t() @ matrix).half().contiguous(), up)


def _damped(hessian: Tensor) -> Tensor:
    counts = hessian / hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    counts.diagonal().add_(DAMPING)
    return counts
