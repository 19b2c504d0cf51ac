"""group_norm_silu: the reference against float64, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from stepquant.errors import LayoutError
from stepquant.kernels import dispatch
from stepquant.kernels.group_norm_silu import group_norm_silu_ref

# The interpreter computes lanes that no pixel needs, and NumPy warns of what they hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    C = shape[1]
    x = torch.randn(shape, generator=generator) * torch.randn(C, 1, 1, generator=generator).exp() + torch.randn(
        C, 1, 1, generator=generator
    )
    weight, bias = torch.randn(2, C, generator=generator)
    return x.to(dtype), (1 + 0.3 * weight).to(dtype), (0.4 * bias).to(dtype)


@pytest.mark.parametrize("shape", [(2, 64, 7, 5), (1, 96, 9, 4)], ids=str)
def test_group_norm_silu_reference_is_within_its_dtypes_rounding_of_float64(shape):
    x, weight, bias = operands(shape)
    expected = functional.silu(functional.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-5))
    torch.testing.assert_close(group_norm_silu_ref(x, weight, bias).double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 64, 7, 5), (1, 96, 9, 4)], ids=str)
def test_group_norm_silu_equals_the_reference(shape, layout, triton_device):
    x, weight, bias = operands(shape)
    actual = dispatch.group_norm_silu(x.to(triton_device, memory_format=layout), weight.to(triton_device), bias.to(triton_device))
    torch.testing.assert_close(actual.cpu(), group_norm_silu_ref(x, weight, bias), rtol=1e-3, atol=1e-4)
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_group_norm_silu_of_a_width_that_32_groups_do_not_divide_is_refused():
    x, weight, bias = operands((1, 40, 4, 4))
    with pytest.raises(LayoutError, match="multiple of 32"):
        dispatch.group_norm_silu(x, weight, bias)
