"""4-bit weights written out as int8 codes for the products that follow. Checks and reference; kernel in triton_ops."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..errors import LayoutError
from .int4_weight import check_int4_weight, expanded_codes

# q, k, v and out of a transformer block's self-attention, q and out of its cross-attention.
MOST_WEIGHTS = 6


def check_int4_expand(qweights: Sequence[Tensor], group_scales: Sequence[Tensor], K: int) -> None:
    """Raise LayoutError unless these are 1 to 6 packed weights of one shape with their scales."""
    shapes = {tuple(qweight.shape) for qweight in qweights}
    if not 1 <= len(qweights) <= MOST_WEIGHTS or len(shapes) != 1 or len(group_scales) != len(qweights):
        raise LayoutError(
            f"int4_expand: {len(qweights)} weights of shapes {sorted(shapes)} with {len(group_scales)} scales; 1 to {MOST_WEIGHTS} of one "
            "shape, each with its scales, are needed. Call it for each shape."
        )
    for qweight, group_scale in zip(qweights, group_scales, strict=True):
        check_int4_weight("int4_expand", qweight, group_scale, K)


def int4_expand_ref(qweights: Sequence[Tensor], group_scales: Sequence[Tensor], K: int) -> list[Tensor]:
    """code * group_scale of every weight.

    Args: qweights: (N, ceil(K / 128) * 64) uint8 each, of one shape; group_scales: (ceil(K / 128), N) int32; see int4_weight.py.
    Returns: (N, K) int8 for each weight.
    Raises: LayoutError if the shapes do not fit or there are more than 6.
    """
    check_int4_expand(qweights, group_scales, K)
    return [expanded_codes(qweight, group_scale, K) for qweight, group_scale in zip(qweights, group_scales, strict=True)]
