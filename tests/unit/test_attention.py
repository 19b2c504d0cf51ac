"""attention: the formula by hand, the reference against float64, the kernel against the reference, what has no kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from stepquant.errors import LayoutError
from stepquant.kernels import dispatch
from stepquant.kernels.attention import attention_ref
from stepquant.kernels.static_scale import StaticScale
from stepquant.quant.sqnr import sqnr_db

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
# B, T, S, heads, width of a head: SDXL's prompt, two of them, one key, lengths that no block divides; tokens' own keys
SHAPES = [(2, 130, 77, 2, 64), (2, 20, 154, 1, 64), (1, 5, 1, 1, 32), (1, 7, 160, 1, 128), (3, 129, 16, 1, 64), (2, 128, 192, 2, 64)]


def inputs(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, ...]:
    """k and v are halves of one tensor, as one product of both would leave them."""
    B, T, S, heads, d = shape
    q = 2 * torch.randn(B, T, heads * d, generator=generator)
    return q.to(dtype), *torch.randn(B, S, 2 * heads * d, generator=generator).to(dtype).chunk(2, -1)


def in_float64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = (x.double().unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def stored(zero_point: bool, buckets: list[int], device: torch.device | str = "cpu") -> StaticScale:
    """Ranges that a few values in a hundred pass."""
    zero_points = torch.linspace(-20, 30, 64).int().to(device) if zero_point else None
    counters = torch.zeros(2, dtype=torch.int32, device=device)
    return StaticScale(torch.linspace(0.005, 0.01, 64, device=device), zero_points, torch.tensor(buckets, device=device), counters)


def test_attention_follows_the_formula_on_a_worked_example():
    q = torch.tensor([[[math.log(3.0) * math.sqrt(2), 0.0]]])  # logits log 3 and 0: weights 3/4 and 1/4
    k, v = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[4.0, 8.0], [0.0, 16.0]]])
    assert attention_ref(q, k, v, 1).flatten().tolist() == pytest.approx([3.0, 10.0])
    static = StaticScale(torch.full((64,), 0.5), None, torch.tensor([7]))
    assert attention_ref(q, k, v, 1, static).codes.tolist() == [[6, 20]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_reference_matches_float64(shape, generator):
    q, k, v = inputs(shape, generator)
    assert sqnr_db(in_float64(q, k, v, shape[3]), attention_ref(q, k, v, shape[3])) > 65  # fp16's own rounding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_kernel_matches_float64(shape, dtype, generator, triton_device):
    q, k, v = inputs(shape, generator, dtype)
    y = dispatch.attention(*(x.to(triton_device) for x in (q, k, v)), shape[3])
    assert y.dtype is dtype and y.shape == q.shape
    assert sqnr_db(in_float64(q, k, v, shape[3]), y.cpu()) > (65 if dtype is torch.float16 else 45)


@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_kernel_writes_the_references_codes(shape, zero_point, generator, triton_device):
    q, k, v = inputs(shape, generator)
    buckets = [3, 60, 17][: shape[0]]
    static = stored(zero_point, buckets)
    expected = attention_ref(q, k, v, shape[3], static)
    on_device = stored(zero_point, buckets, triton_device)
    actual = dispatch.attention(*(x.to(triton_device) for x in (q, k, v)), shape[3], on_device)
    apart = (actual.codes.cpu().int() - expected.codes.int()).abs()
    # Weights of fp16 in the product: 2^-12 of 1 to 2 units, where a code is 0.005 or more.
    assert apart.max() <= 1 and (apart > 0).double().mean() <= 0.03
    assert torch.equal(actual.scale.cpu(), expected.scale) and actual.rows_per_scale == expected.rows_per_scale
    assert (actual.zero_point is None) != zero_point
    assert not zero_point or torch.equal(actual.zero_point.cpu(), expected.zero_point)
    counted, expected_count = on_device.clipped.tolist(), static.clipped.tolist()
    assert counted[1] == expected_count[1] == shape[0] * shape[1]
    assert counted[0] == pytest.approx(expected_count[0], rel=0.02, abs=3)


@pytest.mark.parametrize(("T", "S"), [(9, 77), (64, 192)])
def test_attention_gives_a_nan_to_its_own_row_alone(T, S, generator, triton_device):
    q, k, v = inputs((1, T, S, 1, 64), generator)
    q[0, 4, 10] = float("nan")
    y = dispatch.attention(*(x.to(triton_device) for x in (q, k, v)), 1).cpu()
    assert y.isnan().any(2).tolist() == [[row == 4 for row in range(T)]]
    static = stored(True, [60], triton_device)
    codes = dispatch.attention(*(x.to(triton_device) for x in (q, k, v)), 1, static).codes
    assert (codes[4] == static.zero_point[60]).all()  # a stored scale cannot carry it: read as 0


@pytest.mark.parametrize("S", [77, 192])
def test_attention_reads_rows_that_lie_apart(S, generator, triton_device):
    q, k, v = (x.to(triton_device) for x in inputs((2, 64, S, 2, 64), generator))
    assert not k.is_contiguous()
    apart = torch.cat((q, q, q), 2)[..., :128]
    assert torch.equal(dispatch.attention(apart, k, v, 2), dispatch.attention(q, k.contiguous(), v.contiguous(), 2))


@pytest.mark.parametrize(
    ("T", "keys", "width", "dtype", "taken"),
    [
        (1024, 77, 128, torch.float16, True),
        (1024, 1024, 128, torch.float16, True),
        (4096, 4096, 128, torch.float16, False),
        (1000, 1000, 128, torch.float16, False),
        (1024, 77, 80, torch.float16, False),
        (1024, 77, 128, torch.float32, False),
    ],
    ids=["SDXL's prompt", "SDXL's tokens", "more tokens", "not in blocks", "heads of 40", "fp32"],
)
def test_attention_leaves_to_torch_what_its_kernels_are_not_for(T, keys, width, dtype, taken, triton_device):
    expected = taken and (keys == 77 or triton_device.type == "cpu" or torch.cuda.get_device_capability() == (9, 0))
    q, k = torch.zeros(1, T, width, dtype=dtype, device=triton_device), torch.zeros(1, keys, width, dtype=dtype, device=triton_device)
    assert dispatch.has_attention(q, k, 2) is expected


def test_attention_is_torchs_where_there_is_no_kernel():
    q = torch.zeros(1, 4, 128, dtype=torch.float16)
    assert not dispatch.has_attention(q, q, 2)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [((1, 4, 64), (1, 5, 64), (1, 6, 64)), ((1, 4, 64), (2, 5, 64), (2, 5, 64)), ((1, 4, 63), (1, 5, 63), (1, 5, 63))],
    ids=["keys and values differ", "batches differ", "heads do not divide"],
)
def test_attention_refuses_shapes_that_do_not_fit(q, k, v):
    with pytest.raises(LayoutError, match="attention: q, k and v"):
        attention_ref(torch.zeros(q), torch.zeros(k), torch.zeros(v), 2)
