"""One interface to the ways of rounding 4-bit weights, and what each costs before it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from ...errors import CalibrationError, SchemeError
from ..int4 import Int4Weight, check_int4, quantize_int4
from ..layers import LayerSpec
from .gptq import SWEEPS, gptq_int4
from .hessian import hessian_bytes, uses_hessian


class RoundingMethod(str, Enum):
    PLAIN = "plain"  # to nearest, group scales of least error
    GPTQ = "gptq"  # least error of the layer's output on calibration rows
    RECONSTRUCT = "reconstruct"  # least error of a whole block's output, learned beforehand; GPTQ or plain outside of those blocks


@dataclass(frozen=True)
class Rounding:
    """hessian: layer name -> (K, K) fp32 on any device, for GPTQ (HessianFolder.read). rounded: layer name and shape -> codes that
    were learned, or None (RoundedFolder.find)."""

    method: RoundingMethod = RoundingMethod.PLAIN
    hessian: Callable[[str], Tensor] | None = None
    rounded: Callable[[str, tuple[int, ...]], Int4Weight | None] | None = None

    def __post_init__(self) -> None:
        if self.method is RoundingMethod.GPTQ and self.hessian is None:
            raise CalibrationError("rounding gptq: there are no Hessians. Gather them on a few prompts, or use plain rounding.")
        if self.method is RoundingMethod.RECONSTRUCT and self.rounded is None:
            raise CalibrationError("rounding reconstruct: nothing was learned. Run `reconstruct` first, or use plain rounding.")

    def round(self, weight: Tensor, layer: str) -> Int4Weight:
        """Weight (N, K) -> 4-bit codes and scales. Raises: as quantize_int4 and gptq_int4, and what hessian and rounded raise."""
        if self.method is RoundingMethod.RECONSTRUCT:
            check_int4(weight, layer)
            found = self.rounded(layer, tuple(weight.shape))
            if found is not None:
                return Int4Weight(*(part.to(weight.device) for part in (found.codes, found.group_scale, found.scale)))
        if self.method is RoundingMethod.PLAIN or self.hessian is None or not uses_hessian(layer):
            return quantize_int4(weight, layer)
        return gptq_int4(weight, self.hessian(layer).to(weight.device), layer)


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


def rounding_cost(method: RoundingMethod, layers: Mapping[str, LayerSpec]) -> RoundingCost:
    """What rounding these Linears takes; gathering Hessians and learning blocks are not included, their hosts know what they take.

    Plain: some 40 operations a weight. GPTQ, and reconstruct at most: 2 K for the pass and 2 K for each sweep, and K^3 for the factors
    of each Hessian.
    """
    weights = float(sum(spec.shape[0] * spec.in_channels for spec in layers.values()))
    largest = max((spec.shape[0] * spec.in_channels for spec in layers.values()), default=0)
    if method is RoundingMethod.PLAIN:
        return RoundingCost(40 * weights, 12 * largest, 0)
    found = {name: spec for name, spec in layers.items() if uses_hessian(name)}
    sizes = [(spec.shape[0], spec.in_channels) for spec in found.values()]
    operations = sum(2.0 * (1 + SWEEPS) * N * K**2 + 2.0 * K**3 for N, K in sizes)
    widest = max((K for _, K in sizes), default=0)
    return RoundingCost(40 * weights + operations, 24 * largest + 16 * widest**2, hessian_bytes(found) // 2)
