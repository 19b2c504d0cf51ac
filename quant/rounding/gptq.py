"""GPTQ: rounds 4-bit weights one input channel at a time and lets the channels to come make up for each error.

Minimises E(W') = tr((W' - W) H (W' - W)^T) with H = X^T X of calibration rows X: the squared error of the layer's output.
Source: GPTQ (arXiv 2210.17323), algorithm 1. Differences: two-level group scales, chosen when their group is reached or, with
channels in order of activation, beforehand; and sweeps of coordinate descent over the finished codes, which never raise E.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import CalibrationError
from ..int4 import CODE_MAX, CODE_MIN, GROUP_SIZE, Int4Weight, channel_scale, check_int4, group_scales

# Share of the mean of H's diagonal that is added to it; raised tenfold while H is not positive. GPTQ's own is 0.01 (section 4.2), which
# fits the inputs of 8 prompts too closely: on other prompts two in eleven layers of the demo model were worse than rounded plainly.
DAMPING = 0.1
MAX_DAMPING = 10.0
SWEEPS = 4


def gptq_int4(weight: Tensor, hessian: Tensor, layer: str, by_activation: bool = True, sweeps: int = SWEEPS) -> Int4Weight:
    """4-bit codes of the least output error that a greedy pass finds.

    Args:
        weight: (N, K), any float dtype; left unchanged.
        hessian: (K, K) fp32, sum over calibration rows x of x x^T, any positive factor; left unchanged. On the weight's device.
        layer: name for error messages.
        by_activation: take input channels in the order of their energy, largest first, with group scales chosen beforehand.
        sweeps: of coordinate descent afterwards.
    Raises: WeightError as quantize_int4; CalibrationError if the Hessian is not (K, K), or not finite.
    """
    check_int4(weight, layer)
    K = weight.shape[1]
    if tuple(hessian.shape) != (K, K) or not bool(torch.isfinite(hessian).all()):
        raise CalibrationError(
            f"{layer}: a Hessian of shape {tuple(hessian.shape)}, or not finite, for {K} input channels. Calibrate this model again."
        )
    weight, scale = weight.float(), channel_scale(weight)
    energy = hessian.diagonal()
    damped, inverse = _inverse_factor(hessian, layer)
    if by_activation:
        order = energy.argsort(descending=True)
        group = group_scales(weight, scale, energy)
        step = (group * scale[:, None]).repeat_interleave(GROUP_SIZE, 1)
        _, inverse = _inverse_factor(hessian[order][:, order], layer)
        codes = torch.empty_like(weight)
        codes[:, order] = _in_order(weight[:, order], step[:, order], inverse)
    else:
        codes, group = _group_by_group(weight, scale, energy, inverse)
        step = (group * scale[:, None]).repeat_interleave(GROUP_SIZE, 1)
    for _ in range(sweeps):
        if not _descend(codes, weight, step, damped):
            break
    return Int4Weight(codes.to(torch.int8), group.t().contiguous().to(torch.int8), scale)


def _inverse_factor(hessian: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """The damped Hessian, and the upper Cholesky factor of its inverse."""
    mean = hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    share = DAMPING
    while share <= MAX_DAMPING:
        damped = hessian / mean
        damped.diagonal().add_(share)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return damped, upper
        share *= 10
    raise CalibrationError(f"{layer}: its Hessian cannot be inverted. Calibrate on more prompts, or use plain rounding.")


def _in_order(weight: Tensor, step: Tensor, inverse: Tensor) -> Tensor:
    """Codes (N, K), fp32, of known steps, channel by channel: errors go on at once within a block of 64, to later blocks together."""
    weight, codes = weight.clone(), torch.empty_like(weight)
    for first in range(0, weight.shape[1], GROUP_SIZE):
        block = slice(first, first + GROUP_SIZE)
        codes[:, block], error = _round_block(weight[:, block], step[:, block], inverse[block, block])
        weight[:, block.stop :] -= error @ inverse[block, block.stop :]
    return codes


def _group_by_group(weight: Tensor, scale: Tensor, energy: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """As _in_order, choosing each group's scale for the weights that it is left with: codes (N, K), group scales (N, K / 64)."""
    weight, codes, chosen = weight.clone(), torch.empty_like(weight), []
    for first in range(0, weight.shape[1], GROUP_SIZE):
        block = slice(first, first + GROUP_SIZE)
        group = group_scales(weight[:, block], scale, energy[block])  # (N, 1)
        step = (group * scale[:, None]).expand(-1, GROUP_SIZE)
        codes[:, block], error = _round_block(weight[:, block], step, inverse[block, block])
        weight[:, block.stop :] -= error @ inverse[block, block.stop :]
        chosen.append(group)
    return codes, torch.cat(chosen, 1)


def _round_block(weight: Tensor, step: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (N, 64) of a block, and each channel's error over its diagonal entry of the factor."""
    weight, codes, error = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    for k in range(weight.shape[1]):
        codes[:, k] = (weight[:, k] / step[:, k]).round().clamp(CODE_MIN, CODE_MAX)
        error[:, k] = (weight[:, k] - codes[:, k] * step[:, k]) / inverse[k, k]
        weight[:, k:] -= error[:, k : k + 1] * inverse[k, k:]
    return codes, error


def _descend(codes: Tensor, weight: Tensor, step: Tensor, hessian: Tensor) -> bool:
    """One sweep over the input channels: each code becomes the best one for all others as they are. In place.

    Returns: whether any code changed.
    """
    before = codes.clone()
    error = codes * step - weight  # (N, K)
    for first in range(0, codes.shape[1], GROUP_SIZE):
        block = slice(first, first + GROUP_SIZE)
        gradient = error @ hessian[:, block]  # (N, 64), kept up to date inside the block
        for offset, k in enumerate(range(first, first + GROUP_SIZE)):
            old, unit = codes[:, k].clone(), step[:, k]
            codes[:, k] = (old - gradient[:, offset] / (hessian[k, k] * unit)).round_().clamp_(CODE_MIN, CODE_MAX)
            move = (codes[:, k] - old) * unit
            gradient.addr_(move, hessian[k, block])
            error[:, k] += move
    return not torch.equal(before, codes)
