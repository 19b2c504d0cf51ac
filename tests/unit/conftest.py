"""Runs the Triton kernels in Triton's interpreter where there is no GPU. The rest of the suite is not affected."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads this when it is imported, so it is set before any test module can do that. The CPU's own backend stays
# the reference: only tests that take the fixture below run kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from stepquant.kernels import backend


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Routes the dispatcher to the Triton kernels and names the device to run them on: the GPU, or the CPU interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested here")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        import triton.language
        from triton.runtime.interpreter import InterpretedFunction

        if not isinstance(triton.language.cdiv, InterpretedFunction):
            pytest.skip("something imported Triton before TRITON_INTERPRET=1 was set: run tests/unit by itself")
    monkeypatch.setenv(backend.OVERRIDE, "triton")
    backend.forget_choices()
    yield device
    backend.forget_choices()


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random numbers of this test's own."""
    return torch.Generator().manual_seed(20240607)


@pytest.fixture(scope="session")
def tiny_sdxl_config() -> dict[str, object]:
    """Of a diffusers UNet with SDXL's topology and a few channels."""
    return {
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 64, 64),
        "transformer_layers_per_block": (0, 1, 1),
        "attention_head_dim": (1, 2, 2),
        "cross_attention_dim": 48,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    }
