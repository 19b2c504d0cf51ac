"""Quantization into channel groups: channels reordered and divided by 2^exponent, then one scale per token, image or bucket.

Formula and reference; kernel in triton_ops.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import LayoutError
from .activation import QuantizedActivation
from .channel_group import ChannelGroups
from .quantize_image import quantize_image_ref
from .quantize_static import quantize_static_ref
from .quantize_token import quantize_token_ref
from .static_scale import StaticScale


def check_input(x: Tensor, groups: ChannelGroups) -> None:
    """Raise LayoutError unless x is a float (M, K) or (B, K, H, W) with the groups' K channels."""
    if x.ndim not in (2, 4) or not x.is_floating_point():
        raise LayoutError(
            f"quantize_channel_group: x is {x.dtype} {tuple(x.shape)}; a float (M, K) or (B, C, H, W) is needed. Flatten the others."
        )
    groups.check("quantize_channel_group", x.shape[1])


def quantize_channel_group_ref(x: Tensor, groups: ChannelGroups, static: StaticScale | None = None) -> QuantizedActivation:
    """Quantize x with the groups' channel order and scale ratios.

    q[m, j] = clamp(round(x[m, order[j]] * 2^-exponent[j] / scale[m]) + zero_point[m]), ties to even.
    Without `static` scale[m] is that of the row (of the image, if x is one): absmax over j of |x[m, order[j]]| 2^-exponent[j] / 127.
    Dividing by a power of two is exact: the codes are those of quantize_token, _image or _static on the divided channels.
    Args:
        x: (M, K), or (B, K, H, W) in NCHW, channels_last or strided; any float dtype; left unchanged.
        static: stored scales per timestep bucket; None for dynamic ones.
    Returns: codes (M, K), or (B, H, W, K), channels in stored order; scale and zero_point of the group with exponent 0.
    Raises: LayoutError if the shapes do not fit.
    Source: DGQ (arXiv 2501.04304), section 4.1; scales of power-of-two ratios instead of free ones, see ../quant/channel_group.py.
    """
    check_input(x, groups)
    factor = groups.position_factor if x.ndim == 2 else groups.position_factor.view(-1, 1, 1)
    divided = x.index_select(1, groups.order.long()).float() * factor
    if static is not None:
        return quantize_static_ref(divided, static.scale, static.zero_point, static.bucket, static.clipped)
    return quantize_token_ref(divided) if x.ndim == 2 else quantize_image_ref(divided)
