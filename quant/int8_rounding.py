"""Rounds 8-bit weights, convolutions' too, so that the channels to come make up for each one's error. 4 bits: rounding/gptq.py.

Minimises E(W') = tr((W' - W) H (W' - W)^T), H = mean of x x^T over the rows x that a layer multiplies with its weight: the squared
error of its output. On the demo model it takes 6.4 dB off the noise of all weights, because neighbouring pixels and channels are alike.
Source: GPTQ (arXiv 2210.17323), algorithm 1, with one scale per output channel and channels in order of their energy. Differs in
the rows of a convolution, which hold all taps, and in its damping.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CalibrationError
from .layers import LayerSpec
from .rounding.hessian import hessian_bytes
from .rounding.method import RoundingCost
from .weight import INT8_MAX, QuantizedWeight, quantize_weight

# Share of the mean of H's diagonal that is added to it. On the demo model 0.003 to 0.1 are within 0.2 dB of each other.
DAMPING = 0.03
MAX_DAMPING = 10.0
BLOCK = 128


def gptq_int8(weight: Tensor, moments: Tensor, layer: str) -> QuantizedWeight:
    """8-bit codes of the least output error that a greedy pass finds; scales as quantize_weight's.

    Args:
        weight: (N, K) or (Cout, Cin, kh, kw), any float dtype; left unchanged.
        moments: (K, K) fp32 on the weight's device, mean of x x^T; of a convolution K = Cin * kh * kw in this order. Left unchanged.
        layer: name for error messages.
    Raises: WeightError as quantize_weight; CalibrationError if the moments are not (K, K), or not finite.
    """
    plain = quantize_weight(weight, layer)
    matrix = weight.detach().float().flatten(1)  # (N, K)
    K = matrix.shape[1]
    if tuple(moments.shape) != (K, K) or not bool(torch.isfinite(moments).all()):
        raise CalibrationError(
            f"{layer}: second moments of shape {tuple(moments.shape)}, or not finite, for {K} inputs of its sums. "
            "Calibrate this model again."
        )
    order = moments.diagonal().argsort(descending=True)
    inverse = _inverse_factor(moments[order][:, order], layer)
    codes = torch.empty_like(matrix)
    codes[:, order] = _in_order(matrix[:, order], plain.scale, inverse)
    codes = codes.view(weight.shape).to(torch.int8)
    return QuantizedWeight((codes.permute(0, 2, 3, 1) if weight.ndim == 4 else codes).contiguous(), plain.scale)


def int8_rounding_cost(layers: Mapping[str, LayerSpec]) -> RoundingCost:
    """What gptq_int8 of these layers takes: three factorisations of each (K, K), 4/3 K^3 together, and a pass, N K^2."""
    sizes = [(spec.shape[0], float(spec.sum_length)) for spec in layers.values()]
    operations = sum(4 / 3 * K**3 + N * K**2 for N, K in sizes)
    # fp32: the moments as given, in order, damped, two factors, the inverse; the weight, codes, what is left of it, a block's products.
    peak = max((6 * 4 * K**2 + 4 * 4 * N * K for N, K in sizes), default=0.0)
    return RoundingCost(operations, int(peak), hessian_bytes(layers) // 2)


def _inverse_factor(moments: Tensor, layer: str) -> Tensor:
    """Upper Cholesky factor of the damped moments' inverse, (K, K) fp32."""
    mean = moments.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    share = DAMPING
    while share <= MAX_DAMPING:
        damped = moments / mean
        damped.diagonal().add_(share)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return upper
        share *= 10
    raise CalibrationError(f"{layer}: its second moments cannot be inverted. Calibrate on more prompts, or use plain rounding.")


def _in_order(weight: Tensor, scale: Tensor, inverse: Tensor) -> Tensor:
    """Codes (N, K), fp32: errors go on at once within a block, to later blocks together."""
    weight, codes = weight.clone(), torch.empty_like(weight)
    for first in range(0, weight.shape[1], BLOCK):
        block = slice(first, min(first + BLOCK, weight.shape[1]))
        part, factor = weight[:, block].clone(), inverse[block, block]
        error = torch.empty_like(part)
        for k in range(part.shape[1]):
            code = (part[:, k] / scale).round_().clamp_(-INT8_MAX, INT8_MAX)
            codes[:, first + k] = code
            error[:, k] = (part[:, k] - code * scale) / factor[k, k]
            part[:, k:].addr_(error[:, k], factor[k, k:], alpha=-1)
        weight[:, block.stop :] -= error @ inverse[block, block.stop :]
    return codes
