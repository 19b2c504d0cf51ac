"""Real CUDA graphs through the recorder that the UNet's runner uses: fresh inputs and weights are seen, results are kept apart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stepquant.hosts.comfy.graph_capture import CudaRecorder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="left out: needs an NVIDIA GPU")
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def recorder():
    return CudaRecorder(DEVICE)


def _network(side):
    """(input, weight, work): work reads both where they are."""
    generator = torch.Generator(DEVICE).manual_seed(side)
    x = torch.randn(2, 64, side, side, device=DEVICE, dtype=torch.float16, generator=generator)
    weight = torch.randn(64, 64, 3, 3, device=DEVICE, dtype=torch.float16, generator=generator) / 24
    return x, weight, lambda: torch.nn.functional.silu(torch.nn.functional.conv2d(x, weight, padding=1)).mean(1)


def _close(actual, expected):
    return torch.allclose(actual, expected, rtol=0, atol=2e-3)


def test_replay_sees_new_inputs_and_weights(recorder):
    x, weight, work = _network(32)
    warm = recorder.warm_up(work)
    recording = recorder.record(work, torch.empty_like(work()))
    assert _close(recording.replay(), warm)
    x.copy_(torch.randn_like(x))
    weight.mul_(0.5)
    assert _close(recording.replay(), work())


def test_results_of_two_replays_are_two_tensors(recorder):
    x, _weight, work = _network(16)
    recorder.warm_up(work)
    recording = recorder.record(work, torch.empty_like(work()))
    first = recording.replay()
    kept = first.clone()
    x.zero_()
    second = recording.replay()
    assert torch.equal(first, kept) and not torch.equal(first, second)


def test_graphs_that_share_memory_do_not_spoil_each_other(recorder):
    networks = [_network(side) for side in (16, 48, 24)]
    recordings = []
    for *_, work in networks:
        recorder.warm_up(work)
        recordings.append(recorder.record(work, torch.empty_like(work())))
    for _ in range(3):
        for (x, _, work), recording in zip(networks, recordings, strict=True):
            x.copy_(torch.randn_like(x))
            assert _close(recording.replay(), work())


def test_released_graphs_give_their_memory_back(recorder):
    _x, _weight, work = _network(256)
    output = torch.empty_like(recorder.warm_up(work))
    recorder.record(work, output).release()  # what libraries keep for the recording stream stays
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    recording = recorder.record(work, output)
    assert torch.cuda.memory_reserved() > before
    recording.release()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def test_work_that_waits_for_the_gpu_cannot_be_recorded_and_does_no_harm(recorder):
    x, _weight, work = _network(16)
    with pytest.raises(RuntimeError):
        recorder.record(lambda: work() * work().sum().item(), torch.empty_like(work()))
    assert _close(work(), work())
    other = CudaRecorder(DEVICE)
    other.warm_up(work)
    recording = other.record(work, torch.empty_like(work()))
    x.copy_(torch.randn_like(x))
    assert _close(recording.replay(), work())


def test_kernels_are_recorded_under_cuda_malloc_async_and_a_failure_is_survived():
    """Another process: the allocator is chosen when CUDA starts."""
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
    script = Path(__file__).with_name("async_allocator.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "all is well" in done.stdout, done.stdout + done.stderr[-2000:]
