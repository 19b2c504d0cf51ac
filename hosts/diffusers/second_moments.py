"""Gathers the second moments of layers' inputs that int8_rounding.py needs, all in memory; hessians.py does it for large models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import CalibrationError
from ...quant.layers import LayerSpec, check_is_sdxl, find_layers
from ...quant.rounding.hessian import has_hessian
from ..key_mapping import ldm_to_diffusers
from .quantize import unet_shapes
from .trajectory import Progress, Sampling, sample_latents

# Rows of a layer's input that are taken from one UNet call: 20 steps of 8 prompts give 15,000, six times the widest demo layer.
ROWS_PER_CALL = 768


def gather_second_moments(
    pipeline,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    batch_size: int = 8,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Mean of x x^T over rows that each layer multiplies with its weight, (K, K) fp32 on the UNet's device, by layer.

    A convolution's rows hold all its taps, Cin * kh * kw in the order of its weight. Layers that read the prompt or the timestep
    are left out, and so are very long sums (rounding/hessian.py).
    Args:
        pipeline: an SDXL pipeline whose UNet is not quantized; left as it was, also after an error or a cancel.
        names: of the layers wanted; None for all. Their moments are in memory together: SDXL's take several calls.
        progress: called with (UNet calls done, UNet calls in all). Raising in it cancels.
    Raises: ModelError if the UNet is not SDXL's or quantized already; CalibrationError if there are no prompts.
    """
    if not prompts:
        raise CalibrationError("Gather second moments: no prompts; at least one is needed. Usual is 8 to 16.")
    shapes = unet_shapes(pipeline.unet)
    check_is_sdxl(shapes, "UNet")
    layers = {name: spec for name, spec in find_layers(shapes).items() if has_hessian(spec) and (names is None or name in names)}
    with _observed(pipeline.unet, layers) as found:
        sample_latents(pipeline, prompts, sampling or Sampling(), batch_size, progress)
    return {name: total / rows for name, (total, rows) in found.items()}


@contextmanager
def _observed(unet: nn.Module, layers: Mapping[str, LayerSpec]) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """(sum of x x^T, rows) by layer; the hooks are removed at the block's end."""
    found: dict[str, tuple[Tensor, int]] = {}
    generator = torch.Generator().manual_seed(0)
    handles = [unet.get_submodule(ldm_to_diffusers(name)).register_forward_pre_hook(_adding(name, found, generator)) for name in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _adding(name: str, found: dict[str, tuple[Tensor, int]], generator: torch.Generator) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def before_layer(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = rows_of(module, args[0].detach(), ROWS_PER_CALL, generator)
        total, count = found.get(name, (0.0, 0))
        found[name] = (total + rows.t() @ rows, count + len(rows))

    return before_layer


def rows_of(module: nn.Module, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most so many rows, drawn at random, of what the layer multiplies with its weight: (R, K) fp32."""
    if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
        # A few images' pixels, before they are unfolded: nine times the image would not fit everywhere.
        x = x[torch.randperm(len(x), generator=generator)[: max(1, -(-4 * count // (x.shape[2] * x.shape[3])))].to(x.device)]
        rows = F.unfold(x.float(), module.kernel_size, padding=module.padding, stride=module.stride).transpose(1, 2).flatten(0, 1)
    elif x.ndim == 4:
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    else:
        rows = x.flatten(0, -2)
    if len(rows) > count:
        rows = rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]
    return rows.float()
