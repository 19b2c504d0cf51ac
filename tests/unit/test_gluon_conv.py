"""When Gluon's kernel serves a convolution, and that Triton's does where it cannot. The kernel itself: tests/gpu/test_gluon_conv.py."""

from __future__ import annotations

import pytest
import torch

from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.design import GLUON, Design
from stepquant.kernels.int8_conv2d import int8_conv2d_ref
from stepquant.kernels.int8_upsample_conv2d import int8_upsample_conv2d_ref, phase_weight
from stepquant.kernels.tables import forced_design

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to choose from")

from stepquant.kernels.gluon_ops import conv_launch
from stepquant.kernels.gluon_ops import launch as gluon_launch
from stepquant.kernels.triton_ops import int8_conv2d
from stepquant.kernels.triton_ops.int8_upsample_conv2d import int8_upsample_conv2d

WIDE = Design(64, 64, 64, 4, 3, backend=GLUON, rest_n=32)


def operands(B: int = 1, H: int = 8, W: int = 16, Cin: int = 64, Cout: int = 104) -> dict:
    generator = torch.Generator().manual_seed(0)
    codes, qweight = (torch.randint(-127, 128, size, dtype=torch.int8, generator=generator) for size in ((B, H, W, Cin), (Cout, 3, 3, Cin)))
    activation = QuantizedActivation(codes, torch.rand(B, generator=generator), None, H * W)
    return {"activation": activation, "qweight": qweight, "weight_scale": torch.rand(Cout, generator=generator)}


@pytest.mark.parametrize("stride", [1, 2])
def test_gluon_design_of_a_convolution_is_carried_out_by_triton_where_there_is_no_hopper(stride):
    arguments = operands()
    with forced_design(WIDE):
        y = int8_conv2d.int8_conv2d(**arguments, stride=stride, out_dtype=torch.float32)
    torch.testing.assert_close(y, int8_conv2d_ref(**arguments, stride=stride, out_dtype=torch.float32))


def test_gluon_design_of_an_upsampler_is_carried_out_by_triton():
    activation, weight = (
        operands(Cout=40)["activation"],
        phase_weight(torch.randn(40, 3, 3, 64, generator=torch.Generator().manual_seed(1))),
    )
    with forced_design(WIDE):
        y = int8_upsample_conv2d(activation, weight, None, torch.float32)
    torch.testing.assert_close(y, int8_upsample_conv2d_ref(activation, weight, None, torch.float32))


@pytest.fixture
def served(monkeypatch):
    """Whether the launcher, which believes to be on sm_90, asks Gluon's kernel for int8_conv2d of these arguments."""

    class NotLaunchedError(Exception):
        """Instead of a launch."""

    def convolve(*arguments):
        raise NotLaunchedError

    for module in (gluon_launch, int8_conv2d):
        monkeypatch.setattr(module, "compute_capability", lambda device: 90)
    monkeypatch.setattr(conv_launch, "convolve", convolve)
    monkeypatch.setattr(int8_conv2d, "_launch_triton", lambda *arguments: None)

    def call(**arguments) -> bool:
        with forced_design(WIDE):
            try:
                int8_conv2d.int8_conv2d(**arguments)
            except NotLaunchedError:
                return True
        return False

    return call


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"addend": torch.zeros(1, 104, dtype=torch.float16)}, True),
        ({"addend": torch.zeros(1, 104, 8, 16, dtype=torch.float16).contiguous(memory_format=torch.channels_last)}, True),
        ({"stride": 2}, False),
        ({"out_dtype": torch.float32}, False),
        ({"out_scale": torch.ones(1)}, False),
    ],
    ids=["plain", "per image", "residual", "stride 2", "fp32", "codes"],
)
def test_gluon_serves_convolutions_with_16_bit_results(served, changes, expected):
    assert served(**operands() | changes) is expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [({"Cout": 100}, False), ({"Cin": 20}, False), ({"H": 9, "W": 9}, False), ({"B": 2, "H": 16, "W": 31, "Cout": 8}, True)],
    ids=["results of 200 bytes", "unaligned codes", "boxes mostly outside", "ragged"],
)
def test_gluon_serves_images_that_boxes_fit(served, sizes, expected):
    assert served(**operands(**sizes)) is expected
