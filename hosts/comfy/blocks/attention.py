"""Attention through cuDNN where that is faster and nothing else was asked for; ComfyUI's own choice everywhere else."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from functools import cache
from types import BuiltinFunctionType

import torch
from comfy.ldm.modules import attention
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ....kernels import dispatch

OVERRIDE = "optimized_attention_override"
# H100, 64 channels a head, fp16: cuDNN 183 us against flash attention's 298 at 4096 tokens, 33 against 51 at 1024, and
# over the prompt's 77 keys 15.1 against 20.5 and 10.8 against 13.7. ComfyUI asks for flash attention first.
ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CUDNN_IS_FASTER = (9, 0)
KEEPS_ORDER = "set_priority" in inspect.signature(sdpa_kernel).parameters  # older torch cannot be told an order


def prefers_cudnn(x: Tensor, transformer_options: dict) -> bool:
    """Whether attention in this UNet call should try cuDNN first: Hopper, and neither user nor node chose otherwise."""
    return (
        x.is_cuda
        and KEEPS_ORDER
        and OVERRIDE not in transformer_options
        and attention.optimized_attention is attention.attention_pytorch
        and x.dtype in (torch.float16, torch.bfloat16)
        and _capability(x.device) == CUDNN_IS_FASTER
    )


def is_torch_attention(transformer_options: dict) -> bool:
    """Whether ComfyUI's attention function would be PyTorch's, and nobody else's code."""
    return (
        OVERRIDE not in transformer_options
        and attention.optimized_attention is attention.attention_pytorch
        and isinstance(functional.scaled_dot_product_attention, BuiltinFunctionType)
    )


def cudnn_first() -> AbstractContextManager[None]:
    """Entered once per UNet call: it costs more Python than a launch does."""
    return sdpa_kernel(ORDER, set_priority=True)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, precision: object, transformer_options: dict, in_order: bool) -> Tensor:
    """(B, T, heads * d), and (B, S, heads * d) twice -> (B, T, heads * d). in_order: cudnn_first is in force.

    Where nobody asked for another one than PyTorch's, by a faster kernel if there is one. Otherwise ComfyUI's attention function, looked
    up at each call, so that whatever replaces it is used.
    """
    if is_torch_attention(transformer_options) and dispatch.has_attention(q, k, heads):
        return dispatch.attention(q, k, v, heads)
    if not in_order:
        return attention.optimized_attention(q, k, v, heads, attn_precision=precision, transformer_options=transformer_options)
    B, T, width = q.shape
    q, k, v = (tensor.view(B, -1, heads, width // heads).transpose(1, 2) for tensor in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, width)


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return None if torch.version.hip else torch.cuda.get_device_capability(device)
