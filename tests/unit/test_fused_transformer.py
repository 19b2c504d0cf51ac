"""A whole transformer block: as near to its layers in float64 with kernels for its attentions as with torch's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from stepquant.hosts.compute import LayerTensors, sums_of_codes
from stepquant.hosts.fused import NormTensors
from stepquant.hosts.fused_transformer import Added, Gated, Normed, TransformerTensors, transformer_block
from stepquant.kernels import dispatch
from stepquant.kernels.dispatch import StaticScale
from stepquant.quant.scheme import ActivationMode, Scheme
from stepquant.quant.sqnr import sqnr_db
from stepquant.quant.weight import dequantize_weight, quantize_weight

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
B, S, WIDTH, HEADS = 2, 77, 128, 2


def layer_of(N: int, K: int, seed: int, is_static: bool) -> LayerTensors:
    generator = torch.Generator().manual_seed(seed)
    weight = quantize_weight(torch.randn(N, K, generator=generator) / K**0.5, f"layer {seed}")
    scheme = Scheme(activation=ActivationMode("static" if is_static else "token"), symmetric=not is_static)
    bias = 0.1 * torch.randn(N, generator=generator)
    return LayerTensors(
        f"layer {seed}", scheme, weight.codes, weight.scale, bias.half(), sums_of_codes(weight.codes) if is_static else None
    )


def block_of(is_static: bool) -> TransformerTensors:
    stored = StaticScale(torch.full((64,), 14 / 255), torch.full((64,), 5, dtype=torch.int32), torch.tensor([3, 40])) if is_static else None
    generator = torch.Generator().manual_seed(7)
    norms = [NormTensors(1 + 0.1 * w, 0.1 * b, 1e-5) for w, b in torch.randn(3, 2, WIDTH, generator=generator).half()]
    own = tuple(layer_of(WIDTH, WIDTH, seed, is_static) for seed in range(3))
    query, first, second = (layer_of(WIDTH, WIDTH, seed, is_static) for seed in (3, 4, 5))
    gated = Gated(norms[2], (stored, stored), layer_of(8 * WIDTH, WIDTH, 6, is_static), layer_of(WIDTH, 4 * WIDTH, 8, is_static))
    parts = (Normed(norms[0], stored, own), Added(stored, first), Normed(norms[1], stored, (query,)), Added(stored, second), gated)
    return TransformerTensors(*parts, HEADS, expands=False)


def linear(x: torch.Tensor, layer: LayerTensors) -> torch.Tensor:
    return functional.linear(x, dequantize_weight(layer.qweight, layer.weight_scale, torch.float64), layer.bias.double())


def in_float64(x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: TransformerTensors) -> torch.Tensor:
    def normed(x: torch.Tensor, norm: NormTensors) -> torch.Tensor:
        return functional.layer_norm(x, (WIDTH,), norm.weight.double(), norm.bias.double(), norm.eps)

    def attended(*operands: torch.Tensor) -> torch.Tensor:
        q, k, v = (operand.unflatten(2, (HEADS, -1)).transpose(1, 2) for operand in operands)
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    x, k, v = x.double(), k.double(), v.double()
    y = normed(x, block.own.norm)
    x = x + linear(attended(*(linear(y, layer) for layer in block.own.layers)), block.own_output.layer)
    x = x + linear(attended(linear(normed(x, block.query.norm), block.query.layers[0]), k, v), block.cross_output.layer)
    value, gate = linear(normed(x, block.feed_forward.norm), block.feed_forward.projection).chunk(2, -1)
    return x + linear(value * functional.gelu(gate), block.feed_forward.second)


def moved(value: object, device: torch.device) -> object:
    """The same with its tensors on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(one, device) for one in value)
    if isinstance(value, TransformerTensors | Normed | Added | Gated | NormTensors | StaticScale | LayerTensors):
        return replace(value, **{name: moved(getattr(value, name), device) for name in value.__dataclass_fields__})
    return value


@pytest.mark.parametrize("T", [9, 192], ids=["the prompt's", "both"])
@pytest.mark.parametrize("is_static", [False, True], ids=["token", "static"])
def test_transformer_block_loses_nothing_by_its_attention_kernels(is_static, T, monkeypatch, triton_device):
    generator = torch.Generator().manual_seed(11)
    x, (k, v) = torch.randn(B, T, WIDTH, generator=generator).half(), torch.randn(2, B, S, WIDTH, generator=generator).half()
    block = block_of(is_static)
    exact = in_float64(x, k, v, block)
    on_device = [moved(operand, triton_device) for operand in (x, k, v, block)]
    with_kernel = sqnr_db(exact, transformer_block(*on_device).cpu())
    monkeypatch.setattr(dispatch, "has_attention", lambda *operands: False)
    transformer_block.forget()
    with_torch = sqnr_db(exact, transformer_block(*on_device).cpu())
    assert with_kernel > 27
    assert with_kernel > with_torch - 0.2
