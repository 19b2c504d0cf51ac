"""Timestep groups: the four methods, what they predict, and that a recipe carries their result to the scales."""

import itertools
import math

import pytest
import torch

from stepquant.errors import CalibrationError, SchemeError
from stepquant.quant.calibration import Calibration
from stepquant.quant.group_search import ENTROPY_WEIGHT, search_groups
from stepquant.quant.grouping import GroupingMethod, choose_groups
from stepquant.quant.observer import LayerObserver
from stepquant.quant.optimal_groups import optimal_segments
from stepquant.quant.range_error import bucket_values, segment_errors
from stepquant.quant.recipe import Recipe
from stepquant.quant.scale_curve import curve_ranges
from stepquant.quant.scheme import ActivationMode, Scheme
from stepquant.quant.timestep import ScaleCurve, spread_groups, uniform_groups

STATIC = Scheme(activation=ActivationMode.STATIC)
ONE_SIDED = Scheme(activation=ActivationMode.STATIC, symmetric=False)
BUCKETS = [2, 10, 20, 30, 44, 60]


def calibration(sizes: list[float], one_sided: bool = False, layers: int = 1) -> Calibration:
    """Inputs of a known size in each of BUCKETS."""
    generator = torch.Generator().manual_seed(7)
    seen = {}
    for layer in range(layers):
        observer = LayerObserver(channels=16, seed=layer)
        for bucket, size in zip(BUCKETS, sizes, strict=True):
            x = torch.rand(1, 64, 16, generator=generator) * size
            observer.update(x if one_sided else 2 * x - size, [bucket])
        seen[f"layer{layer}"] = observer.statistics()
    return Calibration(seen)


def least_by_trying(errors: torch.Tensor, groups: int) -> float:
    V = errors.shape[0]

    def total(cuts) -> float:
        edges = [0, *cuts, V]
        return sum(errors[first, end - 1].item() for first, end in itertools.pairwise(edges))

    return min(total(cuts) for count in range(min(groups, V)) for cuts in itertools.combinations(range(1, V), count))


@pytest.mark.parametrize(("V", "groups"), [(1, 1), (2, 2), (6, 1), (6, 3), (7, 5), (5, 8)])
def test_optimal_segments_are_as_good_as_trying_every_division(V, groups):
    errors = torch.rand(V, V, generator=torch.Generator().manual_seed(V), dtype=torch.float64)
    errors[torch.ones(V, V).tril(-1).bool()] = math.inf
    found = optimal_segments(errors, groups)
    cuts = [bucket for bucket in range(1, V) if found[bucket] != found[bucket - 1]]
    edges = [0, *cuts, V]
    assert sum(errors[first, end - 1].item() for first, end in itertools.pairwise(edges)) == pytest.approx(least_by_trying(errors, groups))
    assert found == sorted(found) and len(set(found)) <= groups


@pytest.mark.parametrize("method", ["optimal", "search"])
def test_choose_groups_divides_where_the_range_jumps(method):
    chosen = choose_groups(method, 2, calibration([1, 1, 1, 8, 8, 8]), {"layer0": STATIC})
    groups = chosen.layer_groups["layer0"]
    assert len(set(groups)) == 2
    assert {groups[bucket] for bucket in BUCKETS[:3]}.isdisjoint({groups[bucket] for bucket in BUCKETS[3:]})


def test_search_puts_distant_timesteps_of_equal_range_into_one_group():
    values = bucket_values(calibration([1, 30, 1, 30, 1, 30]).layers["layer0"], 128)
    groups = search_groups([values], [True], 2).groups
    assert groups[0] == groups[2] == groups[4] != groups[1] == groups[3] == groups[5]


def test_search_weights_sum_to_one_and_their_entropy_falls():
    values = bucket_values(calibration([1, 1, 1, 8, 8, 8]).layers["layer0"], 64)
    early, late = (search_groups([values], [True], 2, iterations=count) for count in (1, 150))
    assert torch.allclose(late.importance.sum(1), torch.ones(len(BUCKETS)))
    assert late.entropy().mean() < early.entropy().mean() <= math.log(2) + 1e-6
    assert ENTROPY_WEIGHT == 0.8  # the paper's lambda


def test_search_works_inside_inference_mode():
    values = bucket_values(calibration([1, 1, 1, 8, 8, 8]).layers["layer0"], 64)
    with torch.inference_mode():
        inside = search_groups([values], [True], 2, iterations=20).groups
    assert inside == search_groups([values], [True], 2, iterations=20).groups


@pytest.mark.parametrize("scheme", [STATIC, ONE_SIDED], ids=["symmetric", "one-sided"])
def test_optimal_groups_predict_no_more_error_than_uniform_ones(scheme):
    found = calibration([1, 1.1, 1.3, 2, 6, 7], one_sided=not scheme.symmetric)
    values = bucket_values(found.layers["layer0"])
    errors = segment_errors(values, scheme.symmetric)

    def predicted(groups) -> float:
        members = [[i for i, bucket in enumerate(BUCKETS) if groups[bucket] == group] for group in sorted(set(groups))]
        return sum(errors[one[0], one[-1]].item() for one in members if one)

    best = choose_groups("optimal", 3, found, {"layer0": scheme}).layer_groups["layer0"]
    assert predicted(best) <= predicted(uniform_groups(3)) + 1e-12
    assert predicted(uniform_groups(64)) <= predicted(best) + 1e-12


def test_segment_errors_agree_with_the_rounding_noise_of_a_uniform_input():
    errors = segment_errors(bucket_values(calibration([4] * 6).layers["layer0"]), symmetric=True)
    # a uniform input in [-r, r] has energy r^2 / 3, rounding noise (r / 127)^2 / 12
    assert errors[0, 0].item() == pytest.approx(1 / (4 * 127**2), rel=0.25)
    assert torch.isinf(errors[3, 1])


def test_shared_groups_are_one_division_for_all_layers():
    found = calibration([1, 1, 1, 8, 8, 8], layers=3)
    schemes = dict.fromkeys(found.layers, STATIC)
    for method in ("optimal", "search"):
        chosen = choose_groups(method, 2, found, schemes, shared=True)
        assert not chosen.layer_groups
        assert chosen.groups[20] == 0 and chosen.groups[30] == 1, method


def test_spread_groups_gives_unvisited_buckets_to_the_nearest_visited_one():
    groups = spread_groups([10, 20, 50], [5, 5, 2])
    assert groups[:11] == (0,) * 11
    assert groups[35] == 0 and groups[36] == 1 and groups[63] == 1  # 35 is as near to 20 as to 50: the lower
    assert len(groups) == 64


@pytest.mark.parametrize("points", [1, 2, 3, 4, 8, 16, 64])
def test_curve_ranges_hold_every_measured_range(points):
    buckets, high = torch.tensor(BUCKETS), torch.tensor([1.0, 2.0, 2.5, 4.0, 3.0, 9.0])
    low64, high64 = curve_ranges(buckets, -high / 4, high, points)
    assert bool((high64[buckets] >= high * 0.9999).all()) and bool((low64[buckets] <= -high / 4 * 0.9999).all())
    assert high64.shape == (64,) and bool(torch.isfinite(high64).all())


def test_curve_ranges_of_one_point_are_one_range_and_of_many_are_the_measured_ones():
    buckets, high = torch.tensor(BUCKETS), torch.tensor([1.0, 2.0, 2.5, 4.0, 3.0, 9.0])
    assert curve_ranges(buckets, -high, high, 1)[1].tolist() == pytest.approx([9.0] * 64, rel=1e-4)
    assert curve_ranges(buckets, -high, high, 16)[1][buckets].tolist() == pytest.approx(high.tolist(), rel=0.02)


def test_curve_follows_an_exponential_exactly_with_two_points():
    """A straight line on a logarithmic scale; between and beyond the visited buckets too."""
    buckets = torch.tensor([5, 30, 60])
    _, high = curve_ranges(buckets, torch.zeros(3), (0.05 * buckets).exp(), 2)
    assert high[40].item() == pytest.approx(math.exp(2.0), rel=1e-3)
    assert high[63].item() == pytest.approx(math.exp(3.0), rel=1e-3), "held level beyond the last visited bucket"


def test_curve_tables_rise_smoothly_between_visited_buckets():
    tables = calibration([1, 2, 4, 8, 16, 32]).tables("layer0", STATIC, ScaleCurve(4))
    assert bool((tables.scale[3:60].diff() > 0).all())
    assert tables.zero_point is None


def test_curve_tables_of_a_one_sided_input_use_its_zero_point():
    tables = calibration([1, 2, 4, 8, 16, 32], one_sided=True).tables("layer0", ONE_SIDED, ScaleCurve(6))
    assert tables.zero_point.tolist() == pytest.approx([-128] * 64, abs=1)


def test_recipe_gives_each_layer_its_groups_and_survives_json():
    own = uniform_groups(3)
    recipe = Recipe({"a": STATIC, "b": STATIC}, "plan", "plan", uniform_groups(2), {"a": own}, "optimal")
    again = Recipe.from_json(recipe.to_json(), "file")
    assert again == recipe
    assert again.groups_of("a") == own and again.groups_of("b") == uniform_groups(2)
    curve = Recipe.from_json(Recipe({"a": STATIC}, "p", "p", grouping="curve", curve_points=5).to_json(), "file")
    assert curve.groups_of("a") == ScaleCurve(5)


@pytest.mark.parametrize(
    "damage",
    [{"layer_groups": {"a": [1, 2]}}, {"layer_groups": [0]}, {"curve_points": -1}, {"curve_points": "8"}, {"groups": [64] * 64}],
    ids=["short", "list", "negative", "text", "too large"],
)
def test_recipe_refuses_damaged_groups(damage):
    with pytest.raises(SchemeError, match="timestep groups"):
        Recipe.from_json({**Recipe({"a": STATIC}, "p", "p").to_json(), **damage}, "file")


def test_choose_groups_says_what_is_wrong():
    with pytest.raises(SchemeError, match="grouping 'fuzzy': unknown; choose one of uniform, optimal, search, curve"):
        choose_groups("fuzzy", 8)
    with pytest.raises(SchemeError, match="timestep groups: 65"):
        choose_groups("curve", 65)
    with pytest.raises(CalibrationError, match="no calibration"):
        choose_groups("optimal", 8)
    with pytest.raises(CalibrationError, match="other: not in this calibration"):
        choose_groups("optimal", 8, calibration([1] * 6), {"other": STATIC})


def test_choose_groups_leaves_dynamic_layers_alone():
    chosen = choose_groups("optimal", 4, calibration([1, 2, 3, 4, 5, 6]), {"layer0": Scheme()})
    assert not chosen.layer_groups and chosen.method is GroupingMethod.OPTIMAL
