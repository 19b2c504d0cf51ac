"""Buckets, groups and the way from any sampler's noise level to SDXL's base schedule."""

import pytest
import torch

from stepquant.errors import SchemeError
from stepquant.quant.timestep import base_log_sigmas, sigma_to_timestep, timestep_bucket, uniform_groups


def test_timestep_bucket_spans_all_64_slices_and_clamps():
    buckets = timestep_bucket(torch.tensor([-5.0, 0.0, 15.6, 15.7, 499.0, 999.0, 4000.0]))
    assert buckets.tolist() == [0, 0, 0, 1, 31, 63, 63]


def test_base_schedule_has_sdxl_base_noise_levels():
    sigmas = base_log_sigmas().exp()
    # SDXL base 1.0: sigma_min 0.0292, sigma_max 14.6146
    assert sigmas[0].item() == pytest.approx(0.0292, abs=1e-4)
    assert sigmas[-1].item() == pytest.approx(14.6146, abs=1e-3)


def test_sigma_to_timestep_inverts_the_schedule_and_interpolates():
    sigmas = base_log_sigmas().exp()
    assert sigma_to_timestep(sigmas[[0, 123, 999]]).tolist() == pytest.approx([0, 123, 999], abs=1e-3)
    between = (sigmas[500] * sigmas[501]).sqrt()
    assert sigma_to_timestep(between[None]).item() == pytest.approx(500.5, abs=1e-3)


def test_sigma_to_timestep_clamps_zero_snr_and_edm_extremes():
    assert sigma_to_timestep(torch.tensor([4518.0, 80.0, 0.002])).tolist() == [999.0, 999.0, 0.0]


def test_uniform_groups_are_contiguous_and_equal():
    groups = uniform_groups(8)
    assert len(groups) == 64
    assert list(groups) == sorted(groups)
    assert {groups.count(group) for group in range(8)} == {8}


@pytest.mark.parametrize("groups", [0, 65])
def test_uniform_groups_names_the_range_when_out_of_it(groups):
    with pytest.raises(SchemeError, match="1 to 64"):
        uniform_groups(groups)
