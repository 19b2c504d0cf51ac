"""A process under cudaMallocAsync, ComfyUI's usual allocator: records our kernels as graphs, one of which fails. Run by test_graph.py."""

from __future__ import annotations

import sys
from contextlib import suppress

import torch

from stepquant.hosts.comfy.graph_capture import CudaRecorder
from stepquant.kernels import dispatch
from stepquant.kernels.recording import hides_addresses

DEVICE = torch.device("cuda", 0)


def main() -> None:
    if not hides_addresses():
        raise SystemExit(f"the allocator is {torch.cuda.get_allocator_backend()}")
    recorder = CudaRecorder(DEVICE)
    x = torch.randn(256, 640, device=DEVICE, dtype=torch.float16)
    norm = torch.ones(640, device=DEVICE, dtype=torch.float16), torch.zeros(640, device=DEVICE, dtype=torch.float16)

    def work() -> torch.Tensor:
        made = torch.sin(x)  # memory of the recording
        first, _ = dispatch.layer_norm_quantize(made, *norm, 1e-5)
        second = dispatch.quantize_token(made * 2)  # and a kernel whose plan is new to it
        return sum(one.codes * one.scale[:, None] for one in (first, second))

    expected = work()
    recording = recorder.record(work, torch.empty_like(expected))
    _check(recording.replay(), expected)
    x.copy_(torch.randn_like(x))
    _check(recording.replay(), work())

    def fails() -> torch.Tensor:
        held = [work(), torch.cos(x)]
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(f"{len(held)} tensors are held")
        return held[0]

    with suppress(ValueError):
        recorder.record(fails, torch.empty_like(expected))
    again = CudaRecorder(DEVICE).record(work, torch.empty_like(expected))
    _check(again.replay(), work())
    recording.release()
    again.release()
    _check(work(), work())
    sys.stdout.write("all is well")


def _check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(actual, expected):
        raise SystemExit(f"differs by {(actual - expected).abs().max().item()}")


if __name__ == "__main__":
    main()
