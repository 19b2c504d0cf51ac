"""Quantization with the stored scale of each sample's timestep bucket. Formula and reference; kernel in triton_ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from .activation import QuantizedActivation
from .quantize_image import check_images
from .quantize_token import INT8_MAX, check_rows

INT8_MIN = -128
BUCKETS = 64  # design section 2: the stored tables are expanded to one entry per timestep bucket


def rows_per_bucket(x: Tensor, scale: Tensor, zero_point: Tensor | None, bucket: Tensor) -> int:
    """Rows of x per entry of `bucket`.

    Raises: LayoutError if x is neither a float (M, K) nor (B, C, H, W), a table is not (64,), or `bucket` does not divide the rows.
    """
    if x.ndim == 4:
        check_images(x, "quantize_static")
        rows = x.shape[0] * x.shape[2] * x.shape[3]
    else:
        check_rows(x, "quantize_static")
        rows = x.shape[0]
    for name, table in (("scale", scale), ("zero_point", zero_point)):
        if table is not None and table.shape != (BUCKETS,):
            raise LayoutError(
                f"quantize_static: {name} of shape {tuple(table.shape)}; ({BUCKETS},) is needed. "
                "Expand the timestep groups to one entry per bucket."
            )
    samples = bucket.numel()
    units = x.shape[0]  # images, or rows: a sample never splits either
    if bucket.ndim != 1 or samples == 0 or units % samples:
        raise LayoutError(
            f"quantize_static: bucket of shape {tuple(bucket.shape)} for x of shape {tuple(x.shape)}; "
            "one entry per sample, or one for all, is needed. Pass the buckets of this batch."
        )
    return rows // samples


def gather_buckets(x: Tensor, scale: Tensor, zero_point: Tensor | None, bucket: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """Look the samples' scales up on their device: scale (S,), zero_point (S,) or None, rows of x per entry; no host sync.

    Raises: as rows_per_bucket.
    """
    rows = rows_per_bucket(x, scale, zero_point, bucket)
    return scale.index_select(0, bucket), None if zero_point is None else zero_point.index_select(0, bucket), rows


def quantize_static_ref(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, bucket: Tensor, clipped: Tensor | None = None
) -> QuantizedActivation:
    """Quantize x with the scale, and the zero point if there is one, of each sample's timestep bucket.

    q = clamp(round(x / scale[b]) + zero_point[b], -128, 127), ties to even; without a zero point clamped to [-127, 127].
    Row m belongs to sample m // (M / S), S the length of `bucket`. Infinities saturate; NaN is read as 0, since a
    stored scale cannot carry it.
    Args:
        x: (M, K), or (B, C, H, W) in NCHW, channels_last or strided; any float dtype; left unchanged.
        scale: (64,) fp32, > 0. zero_point: (64,) int32 in [-128, 127], or None.
        bucket: (S,) int64 in [0, 64), on x's device; S divides M (or B). Length 1 serves any batch.
        clipped: (2,) int32, added to: values that the clamp changed (of any size, infinities too), and M; None counts nothing.
    Returns: codes (M, K), or (B, H, W, C) contiguous; scale and zero_point (S,).
    Raises: LayoutError if the shapes do not fit. Values are checked when a file is loaded, not here.
    Source: timestep groups after ADP-DM (arXiv 2305.18723); asymmetric affine codes as usual.
    """
    scale, zero_point, rows_per_scale = gather_buckets(x, scale, zero_point, bucket)
    if x.ndim == 4:
        x = x.permute(0, 2, 3, 1)
    ratio = x.reshape(scale.numel(), rows_per_scale, -1).float() / scale.view(-1, 1, 1)
    ratio = ratio.nan_to_num_(nan=0.0).round_()
    lowest = -INT8_MAX
    if zero_point is not None:
        ratio.add_(zero_point.view(-1, 1, 1))
        lowest = INT8_MIN
    if clipped is not None:
        clipped[0] += ((ratio < lowest) | (ratio > INT8_MAX)).sum()
        clipped[1] += ratio.shape[0] * ratio.shape[1]
    ratio.clamp_(lowest, INT8_MAX)
    return QuantizedActivation(ratio.to(torch.int8).view(x.shape), scale, zero_point, rows_per_scale)
