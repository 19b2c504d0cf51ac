"""Gathers the Hessians that GPTQ needs from a running diffusers pipeline, as many inputs at a time as memory allows. Rounds nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import CalibrationError
from ...quant.int4 import can_be_int4
from ...quant.layers import LayerSpec, check_is_sdxl, find_layers
from ...quant.rounding.hessian import HessianFolder, HessianObserver, has_hessian, hessian_bytes, input_of, readers, uses_hessian
from ..key_mapping import ldm_to_diffusers
from .quantize import unet_shapes
from .second_moments import ROWS_PER_CALL, rows_of
from .trajectory import Progress, Sampling, sample_latents

GIB = 1 << 30
DEFAULT_MEMORY_BYTES = 4 * GIB


@dataclass(frozen=True)
class HessianCost:
    """What gathering will take, known before it starts. unet_calls: each for one batch of prompts, with guidance."""

    inputs: int
    runs: int
    unet_calls: int
    memory_bytes: int
    disk_bytes: int


def hessian_layers(unet: nn.Module, bits: int = 4) -> dict[str, LayerSpec]:
    """The layers that GPTQ rounds: with 4 bits Linears, with 8 convolutions too. Raises ModelError if the UNet is not SDXL's or
    quantized already."""
    shapes = unet_shapes(unet)
    check_is_sdxl(shapes, "UNet")
    layers = find_layers(shapes)
    if bits == 8:
        return {name: spec for name, spec in layers.items() if has_hessian(spec)}
    return {name: spec for name, spec in layers.items() if can_be_int4(spec.shape) and uses_hessian(name)}


def hessian_cost(
    layers: Mapping[str, LayerSpec], prompts: int, sampling: Sampling, batch_size: int, memory_bytes: int = DEFAULT_MEMORY_BYTES
) -> HessianCost:
    """What gather_hessians with these arguments will take."""
    parts = _parts(readers(layers), layers, memory_bytes)
    largest = max((hessian_bytes({name: layers[name] for name in part.values()}) for part in parts), default=0)
    calls = len(parts) * -(-prompts // batch_size) * sampling.steps
    return HessianCost(len(readers(layers)), len(parts), calls, largest, hessian_bytes(layers) // 2)


def gather_hessians(
    pipeline,
    prompts: Sequence[str],
    folder: str | Path,
    sampling: Sampling | None = None,
    batch_size: int = 2,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    progress: Progress | None = None,
    bits: int = 4,
) -> HessianFolder:
    """Sample the prompts and sum x x^T of every input of a layer that GPTQ rounds (hessian_layers).

    The prompts are sampled as often as it takes to keep within memory_bytes, each time for some of the inputs, whose files are
    written at the run's end. Inputs whose files are there already are left out: so a cancelled call is resumed.
    Args:
        pipeline: an SDXL pipeline whose UNet is not quantized; left as it was, also after an error or a cancel.
        folder: made if it is not there; must hold nothing of other settings.
        memory_bytes: of the Hessians gathered together, on the UNet's device; one is gathered at least.
        progress: called with (UNet calls done, UNet calls in all). Raising in it cancels.
        bits: of the weights to be rounded, 4 or 8. What was gathered for 4 is not gathered again for 8.
    Raises: ModelError if the UNet is not SDXL's or quantized already; CalibrationError if there are no prompts, or the folder
        is of other settings; FormatError if it cannot be written.
    """
    if not prompts:
        raise CalibrationError("Gather Hessians: no prompts; at least one is needed. Usual is 32 or more, for few steps each.")
    sampling = sampling or Sampling()
    layers = hessian_layers(pipeline.unet, bits)
    files = HessianFolder(Path(folder), {"prompts": list(prompts), "scheduler": type(pipeline.scheduler).__name__, **asdict(sampling)})
    missing = {name: layer for name, layer in readers(layers).items() if not files.has(name)}
    parts = _parts(missing, layers, memory_bytes)
    calls = -(-len(prompts) // batch_size) * sampling.steps
    for done, part in enumerate(parts):
        with _observed(pipeline.unet, part, layers) as observers:
            shifted = _shifted(progress, done * calls, len(parts) * calls)
            sample_latents(pipeline, prompts, sampling, batch_size, shifted)
        for name, observer in observers.items():
            files.write(name, observer)
    return files


@contextmanager
def hessians_observed(unet: nn.Module) -> Iterator[Callable[[str], Tensor]]:
    """While the block runs, whatever runs the UNet is observed. Yields what gives a layer's Hessian afterwards, for Rounding.

    Takes memory for all inputs at once: for models small enough. Raises ModelError as hessian_layers.
    """
    layers = hessian_layers(unet)
    with _observed(unet, readers(layers), layers) as observers:
        yield lambda layer: observers[input_of(layer)].mean(layer)


def _parts(inputs: Mapping[str, str], layers: Mapping[str, LayerSpec], memory_bytes: int) -> list[dict[str, str]]:
    """The inputs in as few parts, in order, as keep each within the memory."""
    parts: list[dict[str, str]] = []
    taken = 0
    for name, layer in inputs.items():
        size = 4 * layers[layer].sum_length ** 2
        if not parts or taken + size > memory_bytes:
            parts.append({})
            taken = 0
        parts[-1][name] = layer
        taken += size
    return parts


@contextmanager
def _observed(unet: nn.Module, inputs: Mapping[str, str], layers: Mapping[str, LayerSpec]) -> Iterator[dict[str, HessianObserver]]:
    """Observers by input name; their hooks are removed at the block's end."""
    device = next(unet.parameters()).device
    observers = {name: HessianObserver(layers[layer].sum_length, device) for name, layer in inputs.items()}
    generator = torch.Generator().manual_seed(0)
    handles = [
        unet.get_submodule(ldm_to_diffusers(layer)).register_forward_pre_hook(_observing(observers[name], generator))
        for name, layer in inputs.items()
    ]
    try:
        yield observers
    finally:
        for handle in handles:
            handle.remove()


def _observing(observer: HessianObserver, generator: torch.Generator) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Of a Linear all rows, of a convolution some: nine taps a pixel, all of them, would take longer than the sampling."""

    def before_layer(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        is_conv = isinstance(module, nn.Conv2d)
        observer.update(rows_of(module, args[0].detach(), ROWS_PER_CALL, generator) if is_conv else args[0])

    return before_layer


def _shifted(progress: Progress | None, offset: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _total: progress(offset + done, total)
