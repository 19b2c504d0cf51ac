"""Gives a quantized diffusers UNet the factors of a scale set, trainable or not. Holds no losses and reads no files.

Bound to instances: a layer's product, without its bias, is multiplied with its factors; a norm's output with the ones that its
readers share. Values are those of the engine's own kernels, codes of activations included; gradients go straight through
the rounding. Weights become floats one layer at a time, and only in a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ModelError
from ...kernels.dispatch import expanded_codes
from ...quant.tuning.identity import identity
from ...quant.tuning.scale_set import ScaleSet, expert_of, is_scaled_norm, new_scale_set
from ...quant.weight import dequantize_weight
from .. import compute
from ..key_mapping import diffusers_to_ldm, ldm_to_diffusers
from .layers import QuantizedConv2d, QuantizedModule
from .quantize import quantized_layers, state_of

# Factors by name, (E, width) each, as multiplied: exp of a ScaleSet's tables.
Factors = Callable[[str], Tensor]


def empty_scale_set(unet: nn.Module, experts: int = 1) -> ScaleSet:
    """Factors of 1 for every quantized layer of the UNet and every norm that can carry some.

    Raises: ModelError if it is not quantized.
    """
    layers = {name: layer.weight_scale.shape[0] for name, layer in quantized_layers(unet).items()}
    if not layers:
        raise ModelError("UNet: not quantized, so it has no scales to tune. Quantize it first.")
    norms = {name: norm.weight.shape[0] for name, norm in scaled_norms(unet).items()}
    scales = new_scale_set(layers, norms, experts)
    scales.base = identity(reader(unet), state_of(unet).base_model)
    return scales


def scaled_norms(unet: nn.Module) -> dict[str, nn.Module]:
    """The norms that can have factors, by LDM name."""
    norms = (nn.LayerNorm, nn.GroupNorm)
    found = {_ldm(path): module for path, module in unet.named_modules() if isinstance(module, norms)}
    return {name: module for name, module in found.items() if is_scaled_norm(name)}


def reader(unet: nn.Module) -> Callable[[str], Tensor]:
    """Reads an unquantized tensor of the UNet by its LDM name."""
    return lambda name: unet.get_parameter(ldm_to_diffusers(name)).detach()


@contextmanager
def scaled(unet: nn.Module, scales: ScaleSet, trainable: bool = False, float_products: bool = False) -> Iterator[dict[str, nn.Parameter]]:
    """The UNet runs with the factors while the block runs.

    Args:
        trainable: gradients of a loss reach the yielded logarithms, which are copies on the UNet's device; without, none flow.
        float_products: weights are dequantized once and kept, in the UNet's dtype, and activations are not rounded: twice as fast to
            train with. What is trained so runs on codes all the same.
    Raises: ModelError if a layer of the set is none of the UNet's, or is not quantized there; the UNet is unchanged then.
    """
    device = next(unet.parameters()).device
    tables = {**scales.out, **scales.into}
    logs = {name: nn.Parameter(table.to(device, torch.float32).clone(), requires_grad=trainable) for name, table in tables.items()}
    layers, norms = quantized_layers(unet), scaled_norms(unet)
    _check(scales, layers, norms)
    tap = state_of(unet).tap

    def chosen(name: str) -> Tensor:
        factors = logs[name].exp()
        return factors.index_select(0, expert_of(tap.bucket, factors.shape[0]))  # (B, width)

    bound: list[nn.Module] = []
    try:
        for name in scales.out:
            product = _float_product(layers[name], unet.dtype) if float_products else _exact_product(layers[name])
            _bind(layers[name], _scaled_forward(layers[name], product, chosen), bound)
        for name in scales.into:
            _bind(norms[name], _scaled_norm(norms[name], name, chosen), bound)
        yield logs
    finally:
        for module in bound:
            del module.forward


def from_logs(scales: ScaleSet, logs: Mapping[str, Tensor], summary: dict[str, object]) -> ScaleSet:
    """A set like `scales` with trained logarithms."""
    trained = {name: log.detach().float().cpu().clone() for name, log in logs.items()}
    out, into = ({name: trained[name] for name in table} for table in (scales.out, scales.into))
    return ScaleSet(scales.experts, out, into, scales.base, summary)


def _check(scales: ScaleSet, layers: Mapping[str, QuantizedModule], norms: Mapping[str, nn.Module]) -> None:
    for name, table in scales.out.items():
        if name not in layers or layers[name].weight_scale.shape[0] != table.shape[1]:
            raise ModelError(
                f"{name}: in the scale LoRA, but no quantized layer of its size here. Use the model and preset it was tuned on."
            )
    for name, table in scales.into.items():
        if name not in norms or norms[name].weight.shape[0] != table.shape[1]:
            raise ModelError(f"{name}: in the scale LoRA, but no such norm in this UNet. Use the model that it was tuned on.")


def _bind(module: nn.Module, forward: Callable[[Tensor], Tensor], bound: list[nn.Module]) -> None:
    if "forward" in vars(module):
        raise ModelError("UNet: its scales are being tuned or replaced already. Take the other scale set off first.")
    module.forward = forward
    bound.append(module)


def _exact_product(layer: QuantizedModule) -> Callable[[Tensor], Tensor]:
    return lambda x: _Product.apply(x, layer)


def _float_product(layer: QuantizedModule, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    weight = float_weight(layer, dtype)
    if isinstance(layer, QuantizedConv2d):
        return lambda x: F.conv2d(x, weight, None, layer.stride, layer.padding)
    return lambda x: F.linear(x, weight.flatten(1))


def _scaled_forward(layer: QuantizedModule, product: Callable[[Tensor], Tensor], chosen: Factors) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = product(x)
        y = y * _spread(chosen(layer.name), y).to(y.dtype)
        if layer.bias is None:
            return y
        return y + (layer.bias[:, None, None] if y.ndim == 4 else layer.bias).to(y.dtype)

    return forward


def _scaled_norm(norm: nn.Module, name: str, chosen: Factors) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = type(norm).forward(norm, x)
        return y * _spread(chosen(name), y).to(y.dtype)

    return forward


def _spread(factors: Tensor, y: Tensor) -> Tensor:
    """(B, C) -> what multiplies y: (B, C), (B, T, C) or (B, C, H, W)."""
    if y.ndim == 4:
        return factors[:, :, None, None]
    return factors if y.ndim == 2 else factors[:, None]


class _Product(torch.autograd.Function):
    """A layer without bias: its own forward; backwards through the dequantized weight, as if nothing had been rounded."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantizedModule) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        tensors = replace(layer._tensors(), bias=None)
        if isinstance(layer, QuantizedConv2d):
            return compute.conv2d(x, tensors, layer._bucket(), layer.stride, layer.padding)
        return compute.linear(x, tensors, layer._bucket())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        layer = ctx.layer
        weight = float_weight(layer, gradient.dtype)
        if isinstance(layer, QuantizedConv2d):
            return torch.nn.grad.conv2d_input(ctx.shape, weight, gradient, layer.stride, layer.padding), None
        return F.linear(gradient, weight.t()), None


def float_weight(layer: QuantizedModule, dtype: torch.dtype) -> Tensor:
    """What the layer's codes stand for: (N, K) or (Cout, Cin, kh, kw)."""
    if layer.group_scale is not None:
        codes = expanded_codes(layer.qweight, layer.paired_scale, 64 * layer.group_scale.shape[0])
        weight = dequantize_weight(codes, layer.weight_scale, dtype)
        return weight if layer.branch_up is None else weight + (layer.branch_up.float() @ layer.branch_down.float()).to(dtype)
    return dequantize_weight(layer.qweight, layer.weight_scale, dtype, layer.channel_order)


def _ldm(path: str) -> str:
    return diffusers_to_ldm(f"{path}.weight").removesuffix(".weight")
