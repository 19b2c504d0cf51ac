"""Observers, merging, saving, and the static scales made from them."""

import pytest
import torch

from stepquant.errors import CalibrationError, FormatError
from stepquant.quant.calibration import Calibration, merge, static_range
from stepquant.quant.observer import ROWS_KEPT, LayerObserver
from stepquant.quant.scheme import ActivationMode, Scheme
from stepquant.quant.timestep import uniform_groups

STATIC = Scheme(activation=ActivationMode.STATIC, symmetric=True)
ONE_SIDED = Scheme(activation=ActivationMode.STATIC, symmetric=False)


def _observe(values_by_bucket: dict[int, torch.Tensor]) -> LayerObserver:
    observer = LayerObserver(channels=8)
    for bucket, values in values_by_bucket.items():
        observer.update(values, [bucket] * values.shape[0])
    return observer


def _inputs(factor: float, seed: int) -> torch.Tensor:
    return torch.rand(2, 40, 8, generator=torch.Generator().manual_seed(seed)) * factor


def _calibration(**layers: LayerObserver) -> Calibration:
    return Calibration({name: observer.statistics() for name, observer in layers.items()}, {"prompts": 2})


def test_observer_keeps_exact_ranges_per_bucket_and_channel():
    first, second = _inputs(1, 1), _inputs(1, 2)
    statistics = _observe({60: first, 3: second}).statistics()
    assert statistics.buckets.tolist() == [3, 60]
    assert torch.equal(statistics.range_max[1], first.flatten(0, 1).amax(0))
    assert torch.equal(statistics.range_min[0], second.flatten(0, 1).amin(0))
    assert statistics.count.tolist() == [80, 80]


def test_observer_separates_samples_of_one_batch_by_their_timestep():
    x = torch.stack([torch.ones(4, 8), 5 * torch.ones(4, 8)])
    observer = LayerObserver(channels=8)
    observer.update(x, [10, 20])
    assert observer.statistics().range_max[:, 0].tolist() == [1.0, 5.0]


def test_observer_row_sample_is_bounded_and_covers_all_calls():
    observer = LayerObserver(channels=8)
    for call in range(200):
        observer.update(torch.full((1, 100, 8), float(call)), [call % 64])
    rows = observer.statistics().rows
    assert rows.shape == (ROWS_KEPT, 8)
    # a uniform sample of 0..199: the mean of 256 draws has a standard error of 3.6
    assert rows[:, 0].float().mean().item() == pytest.approx(99.5, abs=15)


def test_observer_returns_nothing_when_never_called():
    assert LayerObserver(channels=8).statistics() is None


def test_tables_follow_the_timestep_group():
    calibration = _calibration(layer=_observe({2: _inputs(1, 1), 40: _inputs(10, 2)}))
    scale = calibration.tables("layer", STATIC, uniform_groups(8)).scale
    assert scale.shape == (64,)
    assert scale[0] == scale[7]  # same group
    assert 8 < (scale[40] / scale[2]).item() < 12


def test_tables_of_an_unvisited_group_take_the_nearest_visited_one():
    calibration = _calibration(layer=_observe({2: _inputs(1, 1), 60: _inputs(10, 2)}))
    scale = calibration.tables("layer", STATIC, uniform_groups(8)).scale
    assert scale[16] == scale[2]
    assert scale[50] == scale[60]


def test_tables_clip_at_most_a_tenth_of_the_range_when_the_recorded_rows_miss_an_outlier():
    values = torch.rand(1, 4000, 8, generator=torch.Generator().manual_seed(1))
    values[0, 7, 0] = 4  # 16 of the 4000 rows are recorded, hardly this one
    full, _ = static_range(0, 4, symmetric=True)
    scale = _calibration(layer=_observe({2: values})).tables("layer", STATIC, uniform_groups(1)).scale[0].item()
    assert 0.9 * full == pytest.approx(scale)


def test_static_range_of_one_sided_input_uses_all_codes():
    scale, zero_point = static_range(-0.28, 7.0, symmetric=False)
    assert round(-0.28 / scale) + zero_point == -128
    assert round(7.0 / scale) + zero_point == 127


def test_static_range_always_represents_zero_exactly():
    scale, zero_point = static_range(2.0, 7.0, symmetric=False)
    assert zero_point == -128
    assert scale == pytest.approx(7 / 255)


def test_tables_of_one_sided_layers_carry_a_zero_point():
    tables = _calibration(layer=_observe({2: _inputs(3, 1)})).tables("layer", ONE_SIDED, uniform_groups(1))
    assert tables.zero_point.dtype is torch.int32
    assert tables.zero_point.tolist() == [-128] * 64


def test_tables_name_the_layer_when_it_was_not_observed():
    with pytest.raises(CalibrationError, match="other: not in this calibration"):
        _calibration(layer=_observe({2: _inputs(1, 1)})).tables("other", STATIC, uniform_groups(1))


def test_tables_name_the_layer_when_its_input_was_nan():
    values = _inputs(1, 1)
    values[0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="layer: its input was NaN"):
        _calibration(layer=_observe({2: values})).tables("layer", STATIC, uniform_groups(1))


def test_calibration_survives_saving_and_loading(tmp_path):
    calibration = _calibration(layer=_observe({2: _inputs(1, 1), 40: _inputs(10, 2)}))
    calibration.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    assert loaded.summary == {"prompts": 2}
    groups = uniform_groups(8)
    assert torch.equal(loaded.tables("layer", STATIC, groups).scale, calibration.tables("layer", STATIC, groups).scale)


def test_merge_covers_both_runs():
    first = _calibration(layer=_observe({2: _inputs(1, 1)}), only_first=_observe({2: _inputs(1, 3)}))
    second = _calibration(layer=_observe({2: _inputs(4, 2), 9: _inputs(1, 4)}))
    merged = merge(first, second)
    assert set(merged.layers) == {"layer", "only_first"}
    assert merged.layers["layer"].buckets.tolist() == [2, 9]
    assert merged.layers["layer"].count.tolist() == [160, 80]
    assert torch.equal(merged.layers["layer"].range_max[0], second.layers["layer"].range_max[0])


def test_merge_refuses_calibrations_of_different_models():
    other = LayerObserver(channels=4)
    other.update(torch.ones(1, 3, 4), [0])
    with pytest.raises(CalibrationError, match="8 input channels in one calibration, 4 in the other"):
        merge(_calibration(layer=_observe({2: _inputs(1, 1)})), _calibration(layer=other))


def test_load_refuses_a_file_of_another_kind(tmp_path):
    (tmp_path / "c.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(FormatError, match=r"c\.safetensors: the file is damaged"):
        Calibration.load(tmp_path / "c.safetensors")
