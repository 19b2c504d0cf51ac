"""Repeated operations on a real GPU: the CUDA driver launches them, and they give what their first call gave."""

import threading

import pytest
import torch

from stepquant.kernels import dispatch, plan
from stepquant.kernels.repeat import Repeated, forget_plans

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="left out: needs an NVIDIA GPU")
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def block():
    """(operation, a function that makes its operands): LayerNorm, a product, torch's attention, a product, as in a transformer block."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    qweight = torch.randint(-127, 128, (1280, 1280), dtype=torch.int8, device=DEVICE, generator=generator)
    scale, norm = torch.full((1280,), 1e-4, device=DEVICE), torch.ones(1280, device=DEVICE, dtype=torch.float16)

    @Repeated
    def operation(x, qweight, scale, norm):
        codes, _ = dispatch.layer_norm_quantize(x, norm, norm, 1e-5)
        y = dispatch.int8_gemm(codes, qweight, scale).view(2, -1, 20, 64).transpose(1, 2)
        y = dispatch.call(torch.nn.functional.scaled_dot_product_attention, y, y, y).transpose(1, 2).reshape(x.shape)
        return dispatch.int8_gemm(dispatch.quantize_token(y), qweight, scale, addend=x)

    forget_plans()
    return operation, lambda: (torch.randn(512, 1280, device=DEVICE, dtype=torch.float16, generator=generator), qweight, scale, norm)


def test_repeated_block_is_launched_by_the_driver_and_gives_what_it_is_written_to_give(block):
    operation, make = block
    operation(*make())
    (only,) = operation._plans.values()
    launches = [launch for segment in only._segments for launch in segment.launches]
    assert launches and all(isinstance(launch, plan.DriverLaunches) for launch in launches)
    for _ in range(4):
        operands = make()
        assert torch.equal(operation(*operands), operation._function(*operands))


def test_repeated_block_gives_the_same_on_another_stream_and_in_another_thread(block):
    operation, make = block
    operands = make()
    expected = operation(*operands)
    stream, found = torch.cuda.Stream(), []
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found.append(operation(*operands))
    thread = threading.Thread(target=lambda: found.append(operation(*operands)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert len(found) == 2 and all(torch.equal(one, expected) for one in found)


def test_repeated_block_holds_less_memory_than_its_written_form(block):
    operation, make = block
    operands = make()
    operation(*operands)

    def peak(function) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*operands)
        return torch.cuda.max_memory_allocated() - before

    assert peak(operation) <= peak(operation._function)
