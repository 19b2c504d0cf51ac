"""One interface to the ways of rounding 4-bit weights, and what each costs before it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from ...errors import CalibrationError, SchemeError
from ..int4 import Int4Weight, check_int4, quantize_int4
from ..layers import LayerSpec
from ..low_rank import ROUNDS, STARTS, int4_beside_low_rank
from .gptq import SWEEPS, gptq_int4
from .hessian import hessian_bytes, uses_hessian


class RoundingMethod(str, Enum):
    PLAIN = "plain"  # to nearest, group scales of least error
    GPTQ = "gptq"  # least error of the layer's output on calibration rows
    RECONSTRUCT = "reconstruct"  # least error of a whole block's output, learned beforehand; GPTQ or plain outside of those blocks
    QUEST = "quest"  # codes and scales of feed-forward and time layers tuned beforehand for the UNet's output; the rest as RECONSTRUCT


LEARNED = (RoundingMethod.RECONSTRUCT, RoundingMethod.QUEST)


@dataclass(frozen=True)
class Rounding:
    """hessian: layer name -> (K, K) fp32 on any device, for GPTQ and branches, or None to round plainly (HessianFolder.read and find).
    rounded: layer name and shape -> codes that were learned, or None (RoundedFolder.find)."""

    method: RoundingMethod = RoundingMethod.PLAIN
    hessian: Callable[[str], Tensor | None] | None = None
    rounded: Callable[[str, tuple[int, ...]], Int4Weight | None] | None = None

    def __post_init__(self) -> None:
        if self.method is RoundingMethod.GPTQ and self.hessian is None:
            raise CalibrationError("rounding gptq: there are no Hessians. Gather them on a few prompts, or use plain rounding.")
        if self.method in LEARNED and self.rounded is None:
            name = self.method.value
            raise CalibrationError(f"rounding {name}: nothing was learned. Run `{name}` first, or use plain rounding.")

    def round(self, weight: Tensor, layer: str, rank: int = 0) -> Int4Weight:
        """Weight (N, K) -> 4-bit codes and scales, with a branch of this rank beside them (low_rank.py) if it is not 0.

        Raises: as quantize_int4, gptq_int4 and int4_beside_low_rank, and what hessian and rounded raise; CalibrationError if codes
            were learned with a branch of another rank.
        """
        check_int4(weight, layer)
        if self.method in LEARNED:
            found = self.rounded(layer, tuple(weight.shape))
            if found is not None:
                _check_rank(found, rank, layer)
                return found.to(weight.device)
        hessian = self.hessian(layer) if self.hessian is not None and uses_hessian(layer) else None
        hessian = None if hessian is None else hessian.to(weight.device)

        def rounded(weight: Tensor) -> Int4Weight:
            plain = self.method is RoundingMethod.PLAIN or hessian is None
            return quantize_int4(weight, layer) if plain else gptq_int4(weight, hessian, layer)

        return int4_beside_low_rank(weight, rank, layer, rounded, hessian) if rank else rounded(weight)


def _check_rank(found: Int4Weight, rank: int, layer: str) -> None:
    known = 0 if found.branch is None else found.branch.rank
    if known != rank:
        raise CalibrationError(
            f"{layer}: its codes were learned beside a branch of rank {known}, and the recipe has rank {rank}. Learn them with this recipe."
        )


@dataclass(frozen=True)
class RoundingCost:
    """operations: floating-point operations. peak_bytes: of the largest layer, beside its model. disk_bytes: of Hessians."""

    operations: float
    peak_bytes: int
    disk_bytes: int

    def seconds(self, operations_per_second: float) -> float:
        return self.operations / operations_per_second


def rounding_method(name: str) -> RoundingMethod:
    """Raises SchemeError if there is no such method."""
    known = [method.value for method in RoundingMethod]
    if name not in known:
        raise SchemeError(f"rounding {name!r}: unknown; choose one of {', '.join(known)}.")
    return RoundingMethod(name)


def rounding_cost(method: RoundingMethod, layers: Mapping[str, LayerSpec], ranks: Mapping[str, int] | None = None) -> RoundingCost:
    """What rounding these Linears takes; gathering Hessians and learning blocks are not included, their hosts know what they take.

    Plain: some 40 operations a weight. GPTQ, and what was learned at most: 2 K for the pass and 2 K for each sweep, and K^3 for the
    factors of each Hessian. Layers with a branch (ranks: by name) are rounded several times.
    """
    beside = {name: spec for name, spec in layers.items() if (ranks or {}).get(name)}
    if beside:
        alone = rounding_cost(method, {name: spec for name, spec in layers.items() if name not in beside})
        repeated = rounding_cost(method, beside)
        operations = alone.operations + STARTS * ROUNDS * repeated.operations
        return RoundingCost(operations, max(alone.peak_bytes, 2 * repeated.peak_bytes), alone.disk_bytes + repeated.disk_bytes)
    weights = float(sum(spec.shape[0] * spec.in_channels for spec in layers.values()))
    largest = max((spec.shape[0] * spec.in_channels for spec in layers.values()), default=0)
    if method is RoundingMethod.PLAIN:
        return RoundingCost(40 * weights, 12 * largest, 0)
    found = {name: spec for name, spec in layers.items() if uses_hessian(name)}
    sizes = [(spec.shape[0], spec.in_channels) for spec in found.values()]
    operations = sum(2.0 * (1 + SWEEPS) * N * K**2 + 2.0 * K**3 for N, K in sizes)
    widest = max((K for _, K in sizes), default=0)
    return RoundingCost(40 * weights + operations, 24 * largest + 16 * widest**2, hessian_bytes(found) // 2)
