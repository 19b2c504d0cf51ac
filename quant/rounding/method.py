"""One interface to the ways of rounding 4-bit weights, and what each costs before it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from ...errors import CalibrationError, SchemeError
from ..int4 import Int4Weight, quantize_int4
from ..layers import LayerSpec
from .gptq import SWEEPS, gptq_int4
from .hessian import hessian_bytes, uses_hessian


class RoundingMethod(str, Enum):
    PLAIN = "plain"  # to nearest, group scales of least error
    GPTQ = "gptq"  # least error of the layer's output on calibration rows


@dataclass(frozen=True)
class Rounding:
    """hessian: layer name -> (K, K) fp32 on any device, for GPTQ (HessianFolder.read)."""

    method: RoundingMethod = RoundingMethod.PLAIN
    hessian: Callable[[str], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.method is RoundingMethod.GPTQ and self.hessian is None:
            raise CalibrationError("rounding gptq: there are no Hessians. Gather them on a few prompts, or use plain rounding.")

    def round(self, weight: Tensor, layer: str) -> Int4Weight:
        """Weight (N, K) -> 4-bit codes and scales. Raises: as quantize_int4 and gptq_int4."""
        if self.method is RoundingMethod.PLAIN or not uses_hessian(layer):
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
    """What rounding these Linears takes, gathering Hessians not included.

    Plain: some 40 operations a weight. GPTQ: 2 K for its pass and 2 K for each sweep, and K^3 for the factors of each Hessian.
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
