"""4-bit weights as the kernels take them: planar nibbles with two-level scales. How they are made is in quant/int4.py.

w[n, k] ≈ weight_scale[n] * group_scale[g, n] * code[n, k] with g = k // 64, code in [-8, 7] and an integer group_scale in
[-15, 15], so that code * group_scale is an int8: products are summed as integers over all of K, as with int8 weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError

GROUP_SIZE = 64
# Channels whose codes lie in one run of 64 bytes: the low nibbles are its first group, the high ones its second.
CHANNELS_PER_BLOCK = 2 * GROUP_SIZE
# Nibbles hold code + 8: one multiplication then serves four of them (triton_ops/int4_unpack.py).
NIBBLE_OFFSET = 8


def check_int4_weight(operation: str, qweight: Tensor, group_scale: Tensor, K: int) -> None:
    """Raise LayoutError unless these are the packed codes and group scales of a weight (N, K), as the kernels take them."""
    N, blocks = qweight.shape[0], -(-K // CHANNELS_PER_BLOCK)
    if K % GROUP_SIZE or K == 0 or qweight.dtype != torch.uint8 or tuple(qweight.shape) != (N, blocks * GROUP_SIZE):
        raise LayoutError(
            f"{operation}: qweight is {qweight.dtype} {tuple(qweight.shape)} for {K} terms per output; a multiple of {GROUP_SIZE} "
            f"terms, packed to uint8 {(N, blocks * GROUP_SIZE)}, is needed. Quantize this layer's own weight."
        )
    if group_scale.dtype != torch.int32 or tuple(group_scale.shape) != (blocks, N) or not group_scale.is_contiguous():
        raise LayoutError(
            f"{operation}: group_scale is {group_scale.dtype} {tuple(group_scale.shape)}; contiguous int32 {(blocks, N)} is needed. "
            "Pass paired_scales() of the weight's own."
        )


def paired_scales(group_scale: Tensor) -> Tensor:
    """Stored group scales -> as the kernels take them: made once per weight, not per call.

    The scales of a block's two groups are the halves of one word: a kernel's asynchronous copies move 4 bytes at least.
    Args: group_scale: (K / 64, N) int8.
    Returns: (ceil(K / 128), N) int32, the low half of the first group, the high one of the second, or 0.
    """
    scale = group_scale.to(torch.int32)
    second = torch.zeros_like(scale[::2])
    second[: scale.shape[0] // 2] = scale[1::2]
    return (scale[::2] & 0xFFFF) | (second << 16)


def stored_scales(group_scale: Tensor, K: int) -> Tensor:
    """The inverse of paired_scales: (K / 64, N) int8."""
    both = torch.stack([(group_scale << 16) >> 16, group_scale >> 16], 1)  # (blocks, 2, N)
    return both.flatten(0, 1)[: K // GROUP_SIZE].to(torch.int8)


def expanded_codes(qweight: Tensor, group_scale: Tensor, K: int) -> Tensor:
    """code * group_scale as int8 codes of the whole weight: (N, K), K contiguous.

    Args:
        qweight: (N, ceil(K / 128) * 64) uint8; byte j of block b holds channel 128 b + j in its low and 128 b + 64 + j in its
            high nibble, each as code + 8.
        group_scale: of paired_scales.
    """
    N = qweight.shape[0]
    blocks = qweight.view(N, -1, GROUP_SIZE)
    words = group_scale.t()[:, :, None]  # (N, blocks, 1)
    low = ((blocks & 15).to(torch.int8) - NIBBLE_OFFSET) * ((words << 16) >> 16).to(torch.int8)
    high = ((blocks >> 4).to(torch.int8) - NIBBLE_OFFSET) * (words >> 16).to(torch.int8)
    return torch.stack([low, high], 2).view(N, -1)[:, :K].contiguous()
