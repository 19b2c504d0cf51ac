"""quantize_static: bucket lookup per sample, zero points, saturation; the kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import LayoutError
from stepquant.kernels import dispatch
from stepquant.kernels.quantize_static import quantize_static_ref


def tables(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """64 scales, 64 zero points over the whole range of codes."""
    scale = torch.rand(64, generator=generator) * 0.05 + 0.001
    return scale, torch.randint(-128, 128, (64,), generator=generator, dtype=torch.int32)


def assert_kernel_equals_reference(x, scale, zero_point, bucket, device) -> None:
    expected = quantize_static_ref(x, scale, zero_point, bucket)
    zero_on_device = None if zero_point is None else zero_point.to(device)
    actual = dispatch.quantize_static(x.to(device), scale.to(device), zero_on_device, bucket.to(device))
    assert torch.equal(actual.codes.cpu(), expected.codes)
    assert torch.equal(actual.scale.cpu(), expected.scale)
    assert (actual.zero_point is None) == (zero_point is None)
    assert zero_point is None or torch.equal(actual.zero_point.cpu(), expected.zero_point)
    assert actual.rows_per_scale == expected.rows_per_scale


def test_quantize_static_follows_the_formula_on_a_worked_example():
    scale, zero_point = torch.ones(64), torch.zeros(64, dtype=torch.int32)
    scale[3], zero_point[3] = 0.5, 100
    x = torch.tensor([[0.0, 1.0, 0.25, 0.75, 500.0, -500.0]])
    bucket = torch.tensor([3])
    assert quantize_static_ref(x, scale, zero_point, bucket).codes.tolist() == [[100, 102, 100, 102, 127, -128]]
    assert quantize_static_ref(x, scale, None, bucket).codes.tolist() == [[0, 2, 0, 2, 127, -127]]


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
def test_quantize_static_reads_each_samples_own_bucket_when_a_batch_mixes_timesteps(asymmetric, generator):
    scale, zero_point = tables(generator)
    zero_point = zero_point if asymmetric else None
    x = torch.randn(3 * 10, 64, generator=generator) / 4
    bucket = torch.tensor([63, 0, 17])
    together = quantize_static_ref(x, scale, zero_point, bucket)
    for sample in range(3):
        alone = quantize_static_ref(x[sample * 10 : sample * 10 + 10], scale, zero_point, bucket[sample : sample + 1])
        assert torch.equal(together.codes[sample * 10 : sample * 10 + 10], alone.codes)
        assert together.scale[sample] == scale[bucket[sample]]


def test_quantize_static_reference_matches_float64(generator):
    scale, zero_point = tables(generator)
    x = torch.randn(77, 333, generator=generator).half()
    expected = ((x.double() / scale[9].double()).round() + zero_point[9]).clamp(-128, 127)
    apart = (quantize_static_ref(x, scale, zero_point, torch.tensor([9])).codes.double() - expected).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() <= 1e-3


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize(("shape", "buckets"), [((1, 64), [5]), ((77, 333), [0]), ((78, 333), [63, 1, 30]), ((64, 640), [2, 2])], ids=str)
def test_quantize_static_kernel_equals_the_reference_on_rows(shape, buckets, asymmetric, generator, triton_device):
    scale, zero_point = tables(generator)
    x = torch.randn(shape, generator=generator).half()
    assert_kernel_equals_reference(x, scale, zero_point if asymmetric else None, torch.tensor(buckets), triton_device)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("shape", "buckets"), [((2, 20, 5, 7), [9]), ((3, 64, 1, 4), [63, 0, 9]), ((2, 130, 6, 1), [7, 8])], ids=str)
def test_quantize_static_kernel_equals_the_reference_on_images(shape, buckets, layout, generator, triton_device):
    scale, zero_point = tables(generator)
    x = torch.randn(shape, generator=generator).bfloat16().contiguous(memory_format=layout)
    assert_kernel_equals_reference(x, scale, zero_point, torch.tensor(buckets), triton_device)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("width", [64, 63], ids=["in whole blocks", "in tiles"])
def test_quantize_static_kernel_equals_the_reference_in_whole_blocks_and_in_tiles(width, asymmetric, generator, triton_device):
    scale, zero_point = tables(generator)
    x = torch.randn(64, width, generator=generator)
    x[40, :6] = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 0.0])
    zero_point, bucket = zero_point if asymmetric else None, torch.tensor([63, 5])
    expected_counts, counts = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32, device=triton_device)
    expected = quantize_static_ref(x, scale, zero_point, bucket, expected_counts)
    on_device = [None if table is None else table.to(triton_device) for table in (x, scale, zero_point, bucket)]
    actual = dispatch.quantize_static(*on_device, counts)
    apart = (actual.codes.cpu().int() - expected.codes.int()).abs()
    assert apart.max() <= 1 and (apart > 0).double().mean() <= 1e-4
    assert torch.equal(actual.codes[40, :6].cpu(), expected.codes[40, :6])
    assert torch.equal(actual.scale.cpu(), expected.scale)
    assert counts.tolist() == expected_counts.tolist() and counts[0] > 4


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, in the interpreter: 3e38 / scale
def test_quantize_static_saturates_outliers_and_reads_nan_as_zero(generator, triton_device):
    scale, zero_point = tables(generator)
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 0.0]])
    result = quantize_static_ref(x, scale, zero_point, torch.tensor([4]))
    zero = int(zero_point[4])
    assert result.codes.tolist() == [[zero, 127, -128, 127, -128, zero]]
    assert_kernel_equals_reference(x, scale, zero_point, torch.tensor([4]), triton_device)


@pytest.mark.parametrize(
    ("x", "scale", "bucket", "message"),
    [
        (torch.zeros(7, 4), torch.ones(64), torch.zeros(2, dtype=torch.int64), "bucket of shape"),
        (torch.zeros(8, 4), torch.ones(8), torch.zeros(2, dtype=torch.int64), r"scale of shape \(8,\)"),
        (torch.zeros(2, 8, 4), torch.ones(64), torch.zeros(2, dtype=torch.int64), "is needed"),
    ],
    ids=["rows do not divide", "table too short", "three dimensions"],
)
def test_quantize_static_refuses_shapes_that_do_not_fit(x, scale, bucket, message):
    with pytest.raises(LayoutError, match=message):
        quantize_static_ref(x, scale, None, bucket)
