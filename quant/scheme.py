"""How one layer is quantized. Says nothing about how that choice was made (see recipe.py)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum

from ..errors import SchemeError


class ActivationMode(str, Enum):
    FP16 = "fp16"  # input stays 16 bit, weight is dequantized
    TOKEN = "token"  # dynamic: one scale per row; per image for a 3x3 conv
    STATIC = "static"  # calibrated: one scale and zero point per timestep group


class ComputeType(str, Enum):
    INT8 = "int8"
    FP16 = "fp16"


@dataclass(frozen=True)
class Scheme:
    """weight_bits: 8, symmetric per output channel. symmetric: zero point of a static activation is 0."""

    weight_bits: int = 8
    activation: ActivationMode = ActivationMode.TOKEN
    symmetric: bool = True
    compute: ComputeType = ComputeType.INT8

    def to_json(self) -> dict[str, object]:
        return {key: value.value if isinstance(value, Enum) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: object, layer: str) -> Scheme:
        """Raises SchemeError if `data` holds a field or value this version does not know."""
        known = {"weight_bits", "activation", "symmetric", "compute"}
        if not isinstance(data, dict) or set(data) - known:
            raise SchemeError(f"{layer}: unknown scheme {data!r}. Update StepQuant, or quantize the model again.")
        try:
            scheme = cls(
                weight_bits=data.get("weight_bits", 8),
                activation=ActivationMode(data.get("activation", "token")),
                symmetric=data.get("symmetric", True),
                compute=ComputeType(data.get("compute", "int8")),
            )
        except ValueError as error:
            raise SchemeError(f"{layer}: {error}. Update StepQuant, or quantize the model again.") from None
        if scheme.weight_bits != 8 or not isinstance(scheme.symmetric, bool):
            raise SchemeError(
                f"{layer}: weight_bits {scheme.weight_bits!r}, symmetric {scheme.symmetric!r}; this version runs "
                "8-bit weights. Update StepQuant, or quantize the model again."
            )
        return scheme
