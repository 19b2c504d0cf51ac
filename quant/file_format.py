"""StepQuant's file: one safetensors file with codes, scales and a JSON header. Knows no engine.

Keys: `model.diffusion_model.<layer>.qweight` int8, or F8_E4M3 of fp8 layers, (N, K) or (Cout, kh, kw, Cin), `.weight_scale`
fp32 (N,), `.bias`, `.act_scale` fp32 (64,) and `.act_zero_point` int32 (64,) of static layers, `.channel_order` int32 (K,) and
`.channel_exponents` int8 (blocks,) of layers with channel groups, whose codes are stored in that order. Stock loaders find no `weight`
and refuse.
4-bit layers: `.qweight` uint8 (N, ceil(K / 128) * 64) packed as in int4.py, `.group_scale` int8 (K / 64, N) beside the channels' scales;
where the scheme has a rank R also `.branch_down` (R, K) and `.branch_up` (N, R), fp16 (low_rank.py).
All other tensors keep their own names, text encoders and VAE of a whole checkpoint among them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FormatError
from .atomic_file import save_tensors
from .channel_group import stored_grouping
from .int4 import GROUP_SIZE, MAX_GROUP_SCALE
from .layers import UNET_PREFIX
from .recipe import Recipe
from .safe_header import open_tensors, printable
from .scheme import Scheme
from .timestep import NUM_BUCKETS
from .weight import FP8

HEADER_KEY = "stepquant"
# 2: a layer has a branch, without which its codes are another weight. Files without any are still written as 1, for older versions.
FORMAT_VERSION, BRANCHES_VERSION = 2, 2
FP8_NAN = 0x7F  # e4m3's only NaN, but for the sign
BRANCH_PARTS = ("branch_down", "branch_up")
OPTIONAL_PARTS = ("group_scale", "bias", "act_scale", "act_zero_point", "channel_order", "channel_exponents", *BRANCH_PARTS)


@dataclass
class QuantizedLayer:
    """One layer as stored. act_scale and act_zero_point are None unless its activation mode is static.

    group_scale: of 4-bit weights, whose qweight is packed; None elsewhere.
    channel_order, channel_exponents: as in channel_group.ChannelGrouping, of layers with channel groups. Their qweight holds
    the input channels in that order; None elsewhere.
    branch_down, branch_up: as in low_rank.LowRank, of layers whose scheme has a rank; None elsewhere.
    """

    qweight: Tensor
    weight_scale: Tensor
    bias: Tensor | None = None
    act_scale: Tensor | None = None
    act_zero_point: Tensor | None = None
    channel_order: Tensor | None = None
    channel_exponents: Tensor | None = None
    group_scale: Tensor | None = None
    branch_down: Tensor | None = None
    branch_up: Tensor | None = None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the float weight that the codes stand for: (N, K), or (Cout, Cin, kh, kw)."""
        if self.group_scale is not None:
            return self.qweight.shape[0], GROUP_SIZE * self.group_scale.shape[0]
        shape = tuple(self.qweight.shape)
        return shape if len(shape) == 2 else (shape[0], shape[3], shape[1], shape[2])


@dataclass
class QuantizedModel:
    """rest: the UNet's tensors that stay 16 bit, by LDM name. extra: text encoders and VAE, by their own keys."""

    layers: dict[str, QuantizedLayer]
    rest: dict[str, Tensor]
    recipe: Recipe
    base_model: dict[str, str | None] = field(default_factory=dict)
    calibration: dict[str, object] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Header:
    """base_model: {"name", "sha256"} of what was quantized, as far as known. kind: "unet" or "checkpoint"."""

    version: int
    library_version: str
    kind: str
    base_model: dict[str, str | None]
    recipe: Recipe
    calibration: dict[str, object]


def write_model(path: str | Path, model: QuantizedModel, library_version: str) -> None:
    """Write the file, whole or not at all.

    Raises: FormatError if the folder cannot be written or the disk is full.
    """
    tensors = {UNET_PREFIX + name: tensor for name, tensor in model.rest.items()} | model.extra
    for name, layer in model.layers.items():
        for part, tensor in vars(layer).items():
            if tensor is not None:
                tensors[f"{UNET_PREFIX}{name}.{part}"] = tensor
    header = {
        "version": BRANCHES_VERSION if any(scheme.rank for scheme in model.recipe.schemes.values()) else 1,
        "library_version": library_version,
        "kind": "checkpoint" if model.extra else "unet",
        "base_model": model.base_model,
        "recipe": model.recipe.to_json(),
        "calibration": model.calibration,
    }
    owned = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_tensors(path, owned, {HEADER_KEY: json.dumps(header), "format": "pt"})


def read_header(path: str | Path) -> Header:
    """Raises FormatError or SchemeError if the file is missing, damaged, not ours or newer."""
    with open_tensors(path, HEADER_KEY, FORMAT_VERSION, "a StepQuant model") as (header, _):
        return _to_header(header, path)


def read_model(path: str | Path, device: torch.device | str = "cpu") -> QuantizedModel:
    """Read and check a whole file; tensors are mapped, not copied, where the system allows it.

    Raises: FormatError or SchemeError naming file and layer.
    """
    with open_tensors(path, HEADER_KEY, FORMAT_VERSION, "a StepQuant model") as (raw, file):
        header = _to_header(raw, path)
        tensors = {key: file.get_tensor(key).to(device) for key in file.keys()}  # noqa: SIM118
    unet = {key.removeprefix(UNET_PREFIX): tensors.pop(key) for key in list(tensors) if key.startswith(UNET_PREFIX)}
    layers = {}
    for name, scheme in header.recipe.schemes.items():
        layers[name] = _take_layer(unet, name, path)
        _check_layer(layers[name], name, scheme, path)
        _check_branch(layers[name], name, scheme.rank, header.version, path)
    for key in unet:
        if key.endswith(".qweight"):
            raise FormatError(f"{path}: {key}: has no scheme in the file's recipe. Quantize the model again.")
    return QuantizedModel(layers, unet, header.recipe, header.base_model, header.calibration, tensors)


def _to_header(raw: Mapping, path: str | Path) -> Header:
    def table(key: str) -> dict:
        return raw[key] if isinstance(raw.get(key), dict) else {}

    return Header(
        version=raw["version"],
        library_version=printable(raw.get("library_version")) or "unknown",
        kind=printable(raw.get("kind")) or "unknown",
        base_model={key: printable(table("base_model").get(key)) for key in ("name", "sha256")},
        recipe=Recipe.from_json(raw.get("recipe"), str(path)),
        calibration=table("calibration"),
    )


def _take_layer(tensors: dict[str, Tensor], name: str, path: str | Path) -> QuantizedLayer:
    try:
        qweight, scale = tensors.pop(f"{name}.qweight"), tensors.pop(f"{name}.weight_scale")
    except KeyError as error:
        raise FormatError(f"{path}: {error.args[0]} is missing. The file is incomplete; download or make it again.") from None
    optional = {part: tensors.pop(f"{name}.{part}", None) for part in OPTIONAL_PARTS}
    return QuantizedLayer(qweight, scale, **optional)


def _check_layer(layer: QuantizedLayer, name: str, scheme: Scheme, path: str | Path) -> None:
    def fail(found: str) -> None:
        raise FormatError(f"{path}: {name}: {found}. The file is damaged; download or make it again.")

    static = scheme.is_static
    channels = layer.qweight.shape[0] if layer.qweight.ndim else 0
    if scheme.is_int4 and not _is_int4(layer):
        scales = f"group_scale int8 (K / 64, N) in [-{MAX_GROUP_SCALE}, {MAX_GROUP_SCALE}]"
        fail(f"a 4-bit qweight must be uint8 (N, ceil(K / 128) * 64), with {scales}")
    if not scheme.is_int4 and layer.group_scale is not None:
        fail("it has the group scales of 4-bit weights, and its scheme has 8 bits")
    codes = FP8 if scheme.is_fp8 else torch.int8
    if not scheme.is_int4 and (layer.qweight.dtype is not codes or layer.qweight.ndim not in (2, 4)):
        fail(f"qweight is {layer.qweight.dtype} of shape {tuple(layer.qweight.shape)}; {codes} with 2 or 4 dimensions is needed")
    if scheme.is_fp8 and layer.qweight.numel() and bool(((layer.qweight.view(torch.uint8) & FP8_NAN) == FP8_NAN).any()):
        fail("qweight holds NaN")
    if channels == 0 or layer.qweight.numel() == 0:
        fail(f"qweight of shape {tuple(layer.qweight.shape)} is empty")
    if tuple(layer.weight_scale.shape) != (channels,) or not _is_positive(layer.weight_scale):
        fail(f"weight_scale must be {channels} positive numbers")
    if layer.bias is not None and (tuple(layer.bias.shape) != (channels,) or not bool(torch.isfinite(layer.bias).all())):
        fail(f"bias must be {channels} finite numbers")
    if static and (layer.act_scale is None or tuple(layer.act_scale.shape) != (NUM_BUCKETS,) or not _is_positive(layer.act_scale)):
        fail(f"act_scale must be {NUM_BUCKETS} positive numbers")
    if static and not scheme.symmetric and (layer.act_zero_point is None or tuple(layer.act_zero_point.shape) != (NUM_BUCKETS,)):
        fail(f"act_zero_point must be {NUM_BUCKETS} whole numbers")
    if not scheme.is_grouped and (layer.channel_order is not None or layer.channel_exponents is not None):
        fail("it has channel groups, which its scheme has not")
    K = layer.qweight.shape[-1]
    if scheme.is_grouped and not _is_grouping(layer, K, scheme.granularity):
        fail(f"channel_order must be a permutation of {K} channels, channel_exponents must descend to 0 in blocks of {scheme.granularity}")


def _check_branch(layer: QuantizedLayer, name: str, rank: int, version: int, path: str | Path) -> None:
    """Raise FormatError unless the layer's branch is of its scheme's rank, and its file of a version that has branches."""
    found = [getattr(layer, part) for part in BRANCH_PARTS]
    if not rank and all(part is None for part in found):
        return
    N, K = layer.weight_shape
    expected = [(rank, K), (N, rank)]
    fits = all(
        part is not None and tuple(part.shape) == shape and part.dtype is torch.float16 and bool(torch.isfinite(part).all())
        for part, shape in zip(found, expected, strict=True)
    )
    if not rank or version < BRANCHES_VERSION or not fits:
        raise FormatError(
            f"{path}: {name}: {' and '.join(BRANCH_PARTS)} must be finite, fp16 {' and '.join(map(str, expected))} for its scheme's rank "
            f"{rank}, in a file of version {BRANCHES_VERSION} (this one: {version}). The file is damaged; download or make it again."
        )


def _is_int4(layer: QuantizedLayer) -> bool:
    codes, scale = layer.qweight, layer.group_scale
    if scale is None or scale.dtype is not torch.int8 or scale.ndim != 2 or codes.dtype is not torch.uint8 or codes.ndim != 2:
        return False
    shapes_fit = tuple(codes.shape) == (scale.shape[1], -(-scale.shape[0] // 2) * GROUP_SIZE)
    return shapes_fit and scale.numel() > 0 and int(scale.min()) >= -MAX_GROUP_SCALE and int(scale.max()) <= MAX_GROUP_SCALE


def _is_grouping(layer: QuantizedLayer, K: int, granularity: int) -> bool:
    order, exponents = layer.channel_order, layer.channel_exponents
    return order is not None and exponents is not None and len(order) == K and stored_grouping(order, exponents, granularity) is not None


def _is_positive(scale: Tensor) -> bool:
    return bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
