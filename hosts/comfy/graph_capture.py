"""Records work on an NVIDIA GPU as a CUDA graph and replays it. Knows torch only: no UNet, no ComfyUI."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.recording import hides_addresses


def is_capturing(device: torch.device) -> bool:
    """Whether a graph is being recorded around this call, by whomever."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Recording:
    """One graph and the tensor it leaves its result in. nbytes: VRAM that was reserved for it; cudaMallocAsync does not tell."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor, nbytes: int) -> None:
        self._graph, self._output, self.nbytes = graph, output, nbytes

    def replay(self) -> Tensor:
        """The result of this replay in memory of its own: the next replay overwrites the graph's."""
        self._graph.replay()
        return self._output.clone()

    def release(self) -> None:
        # torch warns that memory of a capture is freed outside of it, which is what is meant here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._graph.reset()
            self._graph = self._output = None


class CudaRecorder:
    """One per UNet. Its graphs share one pool of memory: their results are copied out before another one runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Tensor]) -> Tensor:
        """Run once on the stream that will record: kernels are compiled, libraries get their workspaces."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = work()
        current.wait_stream(self._stream)
        return output.clone()

    def record(self, work: Callable[[], Tensor], output: Tensor) -> Recording:
        """Record the work. Raises what CUDA raises if it cannot be recorded, and what the work raises.

        Args: output: where the graph leaves its result; from outside, so that nothing the graph allocates outlives it:
            cudaMallocAsync cannot free that once the graph is gone.
        """
        if not hides_addresses():
            return self._record(work, output)
        self.warm_up(work)  # what fails, fails here: in a recording it costs memory
        try:
            return self._record(work, output)
        except Exception as error:
            _keep_forever(error)
            raise

    def _record(self, work: Callable[[], Tensor], output: Tensor) -> Recording:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved(self._device)
        # thread_local, as ComfyUI's own graphs: another thread may be loading a model.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            output.copy_(work())
        return Recording(graph, output, max(0, torch.cuda.memory_reserved(self._device) - before))


def _keep_forever(error: Exception) -> None:
    """Its frames hold tensors of the failed recording, which cudaMallocAsync cannot free: even at exit that aborts the process."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(error))
