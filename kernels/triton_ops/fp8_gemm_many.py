"""Launcher of fp8_gemm_many: int8_gemm_many's kernel. Formula: ../fp8_gemm_many.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..activation import QuantizedActivation
from ..fp8_gemm_many import checked_fp8_weights
from .int8_gemm_many import launch_gemm_many


def fp8_gemm_many(
    activation: QuantizedActivation, weights: Sequence[Sequence[Tensor | None]], out_dtype: torch.dtype = torch.float16
) -> list[Tensor]:
    """See fp8_gemm_many_ref; views of one (M, 3N) tensor, or a launch for each weight where tiles do not divide N."""
    return launch_gemm_many(activation, checked_fp8_weights(activation, weights), out_dtype)
