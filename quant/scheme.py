"""How one layer is quantized. Says nothing about how that choice was made (see recipe.py)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum

from ..errors import SchemeError
from .layers import dynamic_low


class ActivationMode(str, Enum):
    FP16 = "fp16"  # input stays 16 bit, weight is dequantized
    TOKEN = "token"  # dynamic: one scale per row; per image for a 3x3 conv
    TOKEN16 = "token16"  # the same with 16-bit codes in two int8 planes: two integer products, as exact as fp16
    STATIC = "static"  # calibrated: one scale and zero point per timestep group
    CHANNEL_GROUP = "channel_group"  # calibrated: input channels in groups with scales of power-of-two ratios (DGQ)


class ComputeType(str, Enum):
    INT8 = "int8"
    FP8 = "fp8"  # e4m3 codes of weights and activations
    FP16 = "fp16"


WEIGHT_BITS = (8, 4)
# Channels per block of a channel group. The kernels take 32 and more; 8 and 16 run in the reference, so that a small
# model is grouped as finely relative to its widths as SDXL.
GRANULARITIES = (8, 16, 32, 64, 128)
MAX_CHANNEL_GROUPS = 16  # the most that DGQ reports (arXiv 2501.04304, table 2)
_GROUP_FIELDS = ("channel_groups", "granularity", "group_base")
MAX_RANK = 256  # SVDQuant's int4 models have 32 (arXiv 2411.05007)


@dataclass(frozen=True)
class Scheme:
    """weight_bits: 8, symmetric per output channel, or 4, of a Linear in groups of 64 (int4.py). symmetric: the activation has no
    zero point. A dynamic one has it only where layers.dynamic_low knows its low end.

    Of channel_group only: channel_groups: at most so many, 1 to 16. granularity: a group holds a multiple of so many
    channels, but for the layer's last ones. group_base: where the scale that all groups share comes from, TOKEN or STATIC.
    Of 4-bit Linears only: rank: of the 16-bit branch beside the codes (low_rank.py); 0 for none.
    """

    weight_bits: int = 8
    activation: ActivationMode = ActivationMode.TOKEN
    symmetric: bool = True
    compute: ComputeType = ComputeType.INT8
    channel_groups: int = 1
    granularity: int = 64
    group_base: ActivationMode = ActivationMode.STATIC
    rank: int = 0

    @property
    def is_int4(self) -> bool:
        return self.weight_bits == 4

    @property
    def is_fp8(self) -> bool:
        return self.compute is ComputeType.FP8

    @property
    def is_wide(self) -> bool:
        """Whether the activation has 16-bit codes, in two planes."""
        return self.activation is ActivationMode.TOKEN16

    @property
    def is_grouped(self) -> bool:
        return self.activation is ActivationMode.CHANNEL_GROUP

    @property
    def is_static(self) -> bool:
        """Whether the layer has scales per timestep group."""
        return (self.group_base if self.is_grouped else self.activation) is ActivationMode.STATIC

    @property
    def needs_calibration(self) -> bool:
        return self.is_static or self.is_grouped

    def to_json(self) -> dict[str, object]:
        left_out = set() if self.is_grouped else set(_GROUP_FIELDS)
        left_out |= set() if self.rank else {"rank"}  # older versions refuse fields that they do not know
        fields = {key: value for key, value in asdict(self).items() if key not in left_out}
        return {key: value.value if isinstance(value, Enum) else value for key, value in fields.items()}

    @classmethod
    def from_json(cls, data: object, layer: str) -> Scheme:
        """Raises SchemeError if `data` holds a field or value this version does not know."""
        known = {"weight_bits", "activation", "symmetric", "compute", "rank", *_GROUP_FIELDS}
        if not isinstance(data, dict) or set(data) - known:
            raise SchemeError(f"{layer}: unknown scheme {data!r}. Update StepQuant, or quantize the model again.")
        try:
            scheme = cls(
                weight_bits=data.get("weight_bits", 8),
                activation=ActivationMode(data.get("activation", "token")),
                symmetric=data.get("symmetric", True),
                compute=ComputeType(data.get("compute", "int8")),
                channel_groups=data.get("channel_groups", 1),
                granularity=data.get("granularity", 64),
                group_base=ActivationMode(data.get("group_base", "static")),
                rank=data.get("rank", 0),
            )
        except ValueError as error:
            raise SchemeError(f"{layer}: {error}. Update StepQuant, or quantize the model again.") from None
        if scheme.weight_bits not in WEIGHT_BITS or not isinstance(scheme.symmetric, bool):
            raise SchemeError(
                f"{layer}: weight_bits {scheme.weight_bits!r}, symmetric {scheme.symmetric!r}; this version runs "
                "weights of 8 and 4 bits. Update StepQuant, or quantize the model again."
            )
        if scheme.is_int4 and scheme.is_grouped:
            raise SchemeError(f"{layer}: 4-bit weights with channel groups; only 8-bit ones can have them. Quantize the model again.")
        if scheme.is_fp8 and scheme != FP8:
            raise SchemeError(
                f"{layer}: fp8 with {scheme.weight_bits}-bit weights, {scheme.activation.value} activations, symmetric "
                f"{scheme.symmetric}; this version runs it with 8 bits and dynamic, symmetric scales. Update StepQuant, or quantize the "
                "model again."
            )
        if scheme.is_wide and scheme != TOKEN16:
            raise SchemeError(
                f"{layer}: token16 with {scheme.weight_bits}-bit weights, {scheme.compute.value} compute, symmetric {scheme.symmetric}; "
                "this version runs it with 8-bit weights in int8 and symmetric scales. Update StepQuant, or quantize the model again."
            )
        scheme._check_groups(layer)
        if type(scheme.rank) is not int or not 0 <= scheme.rank <= (MAX_RANK if scheme.is_int4 else 0):
            raise SchemeError(
                f"{layer}: a branch of rank {scheme.rank!r} beside {scheme.weight_bits}-bit weights; 4-bit ones can have one, of rank "
                f"{MAX_RANK} at most. Update StepQuant, or quantize the model again."
            )
        return scheme

    def _check_groups(self, layer: str) -> None:
        counts = isinstance(self.channel_groups, int) and 1 <= self.channel_groups <= MAX_CHANNEL_GROUPS
        if not counts or self.granularity not in GRANULARITIES or self.group_base not in (ActivationMode.TOKEN, ActivationMode.STATIC):
            raise SchemeError(
                f"{layer}: channel_groups {self.channel_groups!r}, granularity {self.granularity!r}, group_base {self.group_base.value!r}; "
                f"1 to {MAX_CHANNEL_GROUPS} groups of {', '.join(map(str, GRANULARITIES))} channels on token or static are known. "
                "Update StepQuant, or quantize the model again."
            )


FP8 = Scheme(compute=ComputeType.FP8)
TOKEN16 = Scheme(activation=ActivationMode.TOKEN16)


def token_scheme(layer: str) -> Scheme:
    """8 bits with dynamic activation scales, and a zero point where the layer's input can use one."""
    return Scheme(symmetric=dynamic_low(layer) is None)
