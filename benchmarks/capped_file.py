"""A StepQuant file of a full-size SDXL UNet with random codes, for capped_card.py: its sizes are a real model's, its pictures noise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PRESET = "w4a8-token"
# A prime: rows, which are multiples of 64 long, do not repeat each other.
PATTERN = 1_000_003


def unet_shapes(tiny: bool) -> dict[str, tuple[int, ...]]:
    if tiny:
        import speed_models

        speed_models.register_tiny()
        import tiny_sdxl

        return {key: tuple(tensor.shape) for key, tensor in tiny_sdxl.unet_tensors().items()}
    from dynamic_vram import sdxl_shapes

    return sdxl_shapes()


def write_random(path: Path, shapes: Mapping[str, tuple[int, ...]], static: bool) -> None:
    """A StepQuant file of the preset, or the same with static activations: random codes, scaled so that layers have unit gain."""
    import torch

    from stepquant.quant.file_format import QuantizedModel, write_model
    from stepquant.quant.layers import find_layers
    from stepquant.quant.recipe import preset_recipe
    from stepquant.version import VERSION

    generator = torch.Generator().manual_seed(0)
    recipe = preset_recipe(PRESET, find_layers(shapes))
    recipe = with_static_activations(recipe) if static else recipe
    layers = {name: random_layer(shapes, name, scheme, generator) for name, scheme in recipe.schemes.items()}
    ours = {f"{name}.{part}" for name in layers for part in ("weight", "bias")}
    rest = {key: random_tensor(key, shape, generator) for key, shape in shapes.items() if key not in ours}
    write_model(path, QuantizedModel(layers, rest, recipe), VERSION)


def with_static_activations(recipe: Any) -> Any:
    """The recipe with stored scales wherever w8a8-static has them."""
    from dataclasses import replace

    from stepquant.quant.layers import has_symmetric_input, needs_row_scales
    from stepquant.quant.scheme import ActivationMode

    schemes = {
        name: replace(scheme, activation=ActivationMode.STATIC, symmetric=has_symmetric_input(name))
        if scheme.activation is ActivationMode.TOKEN and not needs_row_scales(name)
        else scheme
        for name, scheme in recipe.schemes.items()
    }
    return replace(recipe, schemes=schemes)


def random_layer(shapes: Mapping[str, tuple[int, ...]], name: str, scheme: Any, generator: Any) -> Any:
    import torch

    from stepquant.quant.file_format import QuantizedLayer
    from stepquant.quant.int4 import GROUP_SIZE, MAX_GROUP_SCALE
    from stepquant.quant.timestep import NUM_BUCKETS

    shape = shapes[f"{name}.weight"]
    N, inputs = shape[0], torch.Size(shape[1:]).numel()

    def scale_of(deviation: float) -> torch.Tensor:
        return torch.full((N,), 1 / (deviation * inputs**0.5))

    if scheme.is_int4:
        blocks = -(-inputs // (2 * GROUP_SIZE))
        codes = random_codes((N, blocks * GROUP_SIZE), 0, 256, torch.uint8, generator)
        groups = random_codes((inputs // GROUP_SIZE, N), 1, MAX_GROUP_SCALE + 1, torch.int8, generator)
        layer = QuantizedLayer(codes, scale_of(42.0), group_scale=groups)  # of a uniform nibble times a uniform scale
    else:
        stored = shape if len(shape) == 2 else (N, *shape[2:], shape[1])
        codes = random_codes(stored, -127, 128, torch.int8, generator)
        layer = QuantizedLayer(codes, scale_of(73.0))
    layer.bias = torch.zeros(N).half() if f"{name}.bias" in shapes else None
    if scheme.is_static:
        layer.act_scale = torch.full((NUM_BUCKETS,), 5 / 127 if scheme.symmetric else 5 / 255)
        layer.act_zero_point = None if scheme.symmetric else torch.full((NUM_BUCKETS,), -110, dtype=torch.int32)
    return layer


def random_tensor(key: str, shape: tuple[int, ...], generator: Any) -> Any:
    import torch

    if len(shape) < 2:
        return torch.full(shape, 1.0 if key.endswith("weight") else 0.0).half()
    return (torch.randn(shape, generator=generator) / torch.Size(shape[1:]).numel() ** 0.5).half()


def random_codes(shape: tuple[int, ...], low: int, high: int, dtype: Any, generator: Any) -> Any:
    """A long pattern over and over: a second per GB, where random numbers throughout take ten."""
    import torch

    count = torch.Size(shape).numel()
    pattern = torch.randint(low, high, (min(count, PATTERN),), generator=generator, dtype=dtype)
    return pattern.repeat(-(-count // len(pattern)))[:count].view(shape)
