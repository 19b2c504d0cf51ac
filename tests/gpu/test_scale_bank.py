"""Scale factors in a real CUDA graph: one recording follows the timestep through the experts, and new contents of the scales."""

import pytest
import torch

from stepquant.hosts.comfy.graph_capture import CudaRecorder
from stepquant.hosts.comfy.scale_bank import ScaleBank
from stepquant.quant.tuning.scale_set import new_scale_set

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="left out: needs an NVIDIA GPU")
DEVICE = torch.device("cuda", 0)
LAYER, NORM = "middle_block.1.proj_in", "middle_block.1.norm"


def test_recorded_call_uses_the_expert_of_the_timestep_and_the_scales_of_now():
    scales = new_scale_set({LAYER: 40}, {NORM: 24}, 2)
    generator = torch.Generator().manual_seed(0)
    for table in (scales.out, scales.into):
        for name in table:
            table[name] = 0.3 * torch.randn(table[name].shape, generator=generator)
    bank = ScaleBank(((scales, 1.0),), DEVICE)
    scale, weight = torch.rand(40, device=DEVICE), torch.rand(24, device=DEVICE).half()
    held = bank.hold(LAYER, "weight_scale", scale), bank.hold(NORM, "weight", weight)
    bucket = torch.zeros(2, dtype=torch.int64, device=DEVICE)

    def work():
        bank.follow(bucket)
        return torch.cat([held[0], held[1].float()])

    recorder = CudaRecorder(DEVICE)
    recording = recorder.record(work, torch.empty_like(recorder.warm_up(work)))
    for now, expert in ((0, 0), (63, 1), (31, 0), (32, 1)):
        bucket.fill_(now)
        scale.mul_(1.1)
        replayed = recording.replay()
        assert torch.allclose(replayed[:40], scale * scales.out[LAYER][expert].exp().to(DEVICE), rtol=1e-6)
        assert torch.allclose(replayed[40:], weight.float() * scales.into[NORM][expert].exp().to(DEVICE), rtol=3e-3)
    assert held[0].data_ptr() in {tensor.data_ptr() for tensor in bank.tensors()}
