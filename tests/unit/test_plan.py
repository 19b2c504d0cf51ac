"""Plans: the noise of options, the integer program under each limit, what a plan says of itself, and its recipe."""

import itertools
import json
import math

import pytest
import torch

from stepquant.errors import CalibrationError, PlanError
from stepquant.quant.calibration import Calibration
from stepquant.quant.grouping import choose_groups
from stepquant.quant.layer_noise import (
    FP16,
    INT4_STATIC,
    INT4_TOKEN,
    INT4_WEIGHT_ONLY,
    START_TOKEN_ENERGY,
    STATIC,
    TIME_PER_MAC,
    TOKEN,
    WEIGHT_ONLY,
    WIDE,
    LayerOptions,
    Option,
    candidate_schemes,
    layer_options,
    stored_bytes,
)
from stepquant.quant.layers import LayerSpec
from stepquant.quant.observer import LayerObserver
from stepquant.quant.plan import make_plan, measure_options, uniform_plan, unquantized_bytes
from stepquant.quant.plan_program import Budget, Program
from stepquant.quant.recipe import Recipe
from stepquant.quant.rounding.method import Rounding
from stepquant.quant.scheme import TOKEN16, ActivationMode, ComputeType, Scheme
from stepquant.quant.sensitivity import LayerSensitivity
from stepquant.quant.timestep import uniform_groups

BUCKETS = torch.tensor([4, 30, 60])
UNIFORM = choose_groups("uniform", 8)


def sensitivity(gain: float = 1.0, energy_ratio: float = 1.0) -> LayerSensitivity:
    return LayerSensitivity(torch.tensor([30]), torch.tensor([gain]), torch.tensor([energy_ratio]))


def options(name: str, noises: dict[str, float], macs: float = 1.0, params: int = 1000) -> LayerOptions:
    """A layer whose options make the same noise in every bucket."""
    spec = LayerSpec(name, (params // 10, 10))
    schemes = candidate_schemes(spec)
    made = tuple(
        Option(
            label,
            schemes[label],
            torch.full((3,), noise, dtype=torch.float64),
            torch.full((3,), noise, dtype=torch.float64),
            stored_bytes(spec, schemes[label]),
        )
        for label, noise in noises.items()
    )
    return LayerOptions(name, BUCKETS, macs, made, 2 * params)


def random_layers(count: int, seed: int = 0) -> list[LayerOptions]:
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for index in range(count):
        size = 10 ** (-5 + 2 * torch.rand(3, generator=generator)).double()
        noises = {TOKEN: float(size[0]), STATIC: float(size[1]), WEIGHT_ONLY: float(size.min() / 10), FP16: 0.0}
        layers.append(options(f"layer{index}", noises, macs=float(1 + 4 * size[2] * 1e3), params=1000 * (1 + index % 3)))
    return layers


def all_solutions(layers: list[LayerOptions]):
    return itertools.product(*(range(len(one.options)) for one in layers))


def test_best_plan_is_that_of_trying_every_combination():
    layers = random_layers(5)
    program = Program(layers, 0)
    limit = int(program.size_range()[0] * 1.25)
    fits = [
        list(chosen)
        for chosen in all_solutions(layers)
        if program.total(program.size, chosen) <= limit and program.total(program.integer_macs, chosen) >= 0.6 * program.macs
    ]
    found = program.best(Budget(size_bytes=limit, integer_share=0.6))
    assert found in fits
    assert program.mean_db(found) == pytest.approx(max(program.mean_db(chosen) for chosen in fits), abs=0.01)


def test_plan_with_a_floor_is_the_fastest_that_reaches_it():
    layers = random_layers(5, seed=3)
    program = Program(layers, 0)
    floor = (program.mean_db([0] * 5) + program.mean_db(program.best(Budget(integer_share=0.0)))) / 2
    floor = min(floor, 60.0)
    reach = [list(chosen) for chosen in all_solutions(layers) if program.mean_db(chosen) >= floor]
    found = program.fastest(Budget(sqnr_db=floor, integer_share=0.0))
    assert program.mean_db(found) >= floor
    assert program.total(program.time, found) <= 1.05 * min(program.total(program.time, chosen) for chosen in reach)


def test_plan_keeps_the_layer_in_16_bit_that_matters_most():
    noises = {TOKEN: 1e-4, FP16: 0.0}
    layers = [options("quiet", noises, macs=49), options("loud", {TOKEN: 1e-2, FP16: 0.0}, macs=1), options("mild", noises, macs=50)]
    plan = make_plan(layers, Budget(integer_share=0.98), UNIFORM, other_bytes=0)
    assert plan.kept_16_bit == ["loud"] and "loud" not in plan.recipe.schemes
    assert plan.integer_share == pytest.approx(0.99)
    assert plan.mean_db == pytest.approx(-10 * math.log10(2e-4))
    assert any("stays 16 bit: loud" in line for line in plan.lines())
    assert any("integer multiply-adds: 99.0 %" in line for line in plan.lines())


def test_plan_takes_16_bit_codes_only_to_reach_a_floor_and_says_how_many_products_run_twice():
    noises = {TOKEN: 1e-4, WIDE: 1e-7, FP16: 0.0}
    layers = [options("loud", {**noises, TOKEN: 1e-2}, macs=10), options("quiet", noises, macs=40), options("mild", noises, macs=50)]
    assert set(make_plan(layers, Budget(integer_share=1.0), UNIFORM, 0).choices.values()) == {TOKEN}
    plan = make_plan(layers, Budget(sqnr_db=35.0, integer_share=1.0), UNIFORM, 0)
    assert plan.choices == {"loud": WIDE, "quiet": TOKEN, "mild": TOKEN}
    assert plan.integer_share == 1.0 and plan.wide_share == pytest.approx(0.1) and plan.mean_db >= 35
    assert any("10.0 % with 16-bit codes, which take two products" in line for line in plan.lines())
    assert plan.recipe.schemes["loud"] == TOKEN16


def test_plan_prefers_float_products_to_16_bit_codes_where_integers_need_not_be():
    layers = [options("loud", {TOKEN: 1e-2, WIDE: 1e-7, FP16: 0.0}, macs=1), options("quiet", {TOKEN: 1e-4, FP16: 0.0}, macs=99)]
    assert make_plan(layers, Budget(sqnr_db=35.0), UNIFORM, 0).choices["loud"] == FP16


def test_noise_shares_sum_to_one_and_name_the_loudest():
    plan = make_plan([options("a", {TOKEN: 3e-4}), options("b", {TOKEN: 1e-4})], Budget(), UNIFORM, 0)
    assert plan.noise_share == pytest.approx({"a": 0.75, "b": 0.25})


def test_plan_stays_under_a_size_and_a_vram_limit():
    layers = random_layers(12)
    program = Program(layers, 500)
    free = make_plan(layers, Budget(integer_share=0.0), UNIFORM, 500)
    limit = int((free.size_bytes + program.size_range()[0] + 500) / 2)
    assert make_plan(layers, Budget(size_bytes=limit, integer_share=0.0), UNIFORM, 500).size_bytes <= limit < free.size_bytes
    in_memory = make_plan(layers, Budget(vram_bytes=limit, integer_share=0.0), UNIFORM, 500)
    assert in_memory.vram_bytes <= limit and in_memory.vram_bytes - in_memory.size_bytes == 2 * 3000


def test_frontier_rises_with_size_and_falls_with_the_integer_share():
    plan = make_plan(random_layers(12), Budget(), UNIFORM, 0, with_frontier=True)
    by_share = {share: [p.sqnr_db for p in plan.frontier if p.integer_share == share] for share in {p.integer_share for p in plan.frontier}}
    assert all(values == sorted(values) for values in by_share.values())
    assert by_share[0.5][-1] >= by_share[0.9][-1] >= by_share[1.0][-1]


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        (Budget(size_bytes=10), r"the smallest file is 0\.\d MB"),
        (Budget(sqnr_db=200.0), r"200\.0 dB asked, at most \d+\.\d dB fits"),
    ],
    ids=["size", "quality"],
)
def test_plan_says_what_would_fit_when_nothing_does(budget, sentence):
    with pytest.raises(PlanError, match=sentence):
        make_plan(random_layers(4), budget, UNIFORM, 0)


def test_plan_says_so_when_protected_layers_leave_too_few_integers():
    layers = [options("kept", {FP16: 0.0}, macs=10), options("b", {TOKEN: 1e-4, FP16: 0.0}, macs=90)]
    with pytest.raises(PlanError, match=r"98 % integer multiply-adds asked, protected layers leave 90\.0 %"):
        make_plan(layers, Budget(), UNIFORM, 0)


def observed(name: str, K: int, rows: int = 400, scale=(1.0, 1.0, 1.0), seed: int = 0) -> tuple[LayerObserver, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    observer = LayerObserver(channels=K)
    x = torch.randn(3, rows, K, generator=generator) * torch.tensor(scale).view(3, 1, 1)
    for part, bucket in zip(x, BUCKETS.tolist(), strict=True):
        observer.update(part[None], [bucket])
    return observer, x


def test_layer_noise_of_a_linear_is_what_integer_arithmetic_makes():
    """Against the layer itself on other rows than the recorded ones."""
    spec = LayerSpec("output_blocks.3.1.transformer_blocks.0.attn1.to_q", (48, 64))
    observer, x = observed(spec.name, 64)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    y = x @ weight.T
    ratio = float((y.square().sum() / y[..., 0].numel()) / (x.square().sum() / x[..., 0].numel()))
    found = layer_options(spec, weight, observer.statistics(), sensitivity(0.5, ratio), uniform_groups(1), candidate_schemes(spec))
    row_scale = x.abs().amax(-1, keepdim=True) / 127
    weight_scale = weight.abs().amax(1, keepdim=True) / 127
    quantized = ((x / row_scale).round() * row_scale) @ ((weight / weight_scale).round() * weight_scale).T
    measured = ((quantized - y).square().sum((1, 2)) / y.square().sum((1, 2))).tolist()
    token = found.find(TOKEN)
    assert token.local_noise.tolist() == pytest.approx(measured, rel=0.25)
    assert torch.allclose(token.noise, 0.5 * token.local_noise)
    assert bool((found.find(WEIGHT_ONLY).noise < token.noise).all()) and not bool(found.find(FP16).noise.any())
    assert token.is_integer and not found.find(WEIGHT_ONLY).is_integer


def test_layer_noise_of_one_static_scale_grows_where_the_input_is_small():
    spec = LayerSpec("middle_block.1.proj_in", (16, 32))
    observer, _ = observed(spec.name, 32, scale=(0.1, 1.0, 1.0))
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    one, eight = (
        layer_options(spec, weight, observer.statistics(), sensitivity(1.0, 16.0), uniform_groups(count), candidate_schemes(spec)).find(
            STATIC
        )
        for count in (1, 8)
    )
    assert one.local_noise[0] > 20 * one.local_noise[2]
    assert eight.local_noise[0] < 3 * eight.local_noise[2]


def test_layer_noise_of_a_prompt_reader_is_no_less_than_the_start_token_s_part():
    """The start token is one row of 77, and most of what pixels attend to."""
    x = torch.randn(77, 64, generator=torch.Generator().manual_seed(3))
    x[0, 5] = 800.0
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    weight[:, 5] = 0.0
    noise = {}
    for name in ("attn2.to_k", "attn1.to_k"):
        spec = LayerSpec(f"middle_block.1.transformer_blocks.0.{name}", (48, 64))
        observer = LayerObserver(channels=64)
        for _ in range(30):  # 16 rows are kept of each
            observer.update(x[None], [3])
        ratio = float((x @ weight.T).square().sum() / x.square().sum())
        options = layer_options(spec, weight, observer.statistics(), sensitivity(1.0, ratio), uniform_groups(1), candidate_schemes(spec))
        noise[name] = float(options.find(TOKEN).local_noise)
    # Beside 800 all its other values become 0, and nothing is left of its output.
    assert noise["attn2.to_k"] == pytest.approx(START_TOKEN_ENERGY, rel=0.1)
    assert noise["attn1.to_k"] < noise["attn2.to_k"] / 8


def test_layer_noise_of_8_bit_weights_is_less_if_they_are_rounded_by_moments():
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(400, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    observer = LayerObserver(64)
    observer.update(rows[None], [3])
    weight = torch.randn(32, 64, generator=generator)
    given = (LayerSpec("middle_block.1.proj_in", (32, 64)), weight, observer.statistics(), sensitivity(), uniform_groups(1))
    schemes = {WEIGHT_ONLY: Scheme(activation=ActivationMode.FP16, compute=ComputeType.FP16)}
    plain, rounded = (layer_options(*given, schemes, moments=one).options[0].noise for one in (None, rows.t() @ rows / len(rows)))
    assert float(rounded) < float(plain) / 2


def test_convolution_counts_its_taps_and_its_stride():
    plain, strided = LayerSpec("output_blocks.2.2.conv", (8, 8, 3, 3)), LayerSpec("input_blocks.3.0.op", (8, 8, 3, 3))
    statistics = observed("", 8)[0].statistics()
    weight = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(1))
    macs = [layer_options(one, weight, statistics, sensitivity(), uniform_groups(1), {FP16: None}).macs for one in (plain, strided)]
    assert macs == [1200 * 8 * 8 * 9, 1200 * 8 * 8 * 9 / 4]


@pytest.mark.parametrize("spec", [LayerSpec("middle_block.1.proj_in", (48, 64)), LayerSpec("middle_block.0.in_layers.2", (48, 64, 3, 3))])
def test_16_bit_codes_leave_the_weights_noise_and_no_other(spec):
    observer, _ = observed(spec.name, 64)
    weight = torch.randn(spec.shape, generator=torch.Generator().manual_seed(1))
    found = layer_options(spec, weight, observer.statistics(), sensitivity(), uniform_groups(1), candidate_schemes(spec, 4, 16))
    assert found.find(WIDE).noise.tolist() == pytest.approx(found.find(WEIGHT_ONLY).noise.tolist(), rel=1e-3)
    assert found.find(WIDE).is_integer and found.find(WIDE).stored_bytes == found.find(WEIGHT_ONLY).stored_bytes
    assert bool((found.find(TOKEN).noise > 1.5 * found.find(WIDE).noise).all())


def test_candidates_of_layers_with_a_scale_per_row_have_no_static_one():
    assert STATIC not in candidate_schemes(LayerSpec("input_blocks.4.1.transformer_blocks.0.attn2.to_k", (64, 64)))
    assert list(candidate_schemes(LayerSpec("middle_block.1.proj_in", (64, 64)))) == [TOKEN, STATIC, WIDE, WEIGHT_ONLY, FP16]
    assert set(candidate_schemes(LayerSpec("middle_block.1.proj_in", (64, 512)), channel_groups=4)) <= set(TIME_PER_MAC)


def test_candidates_with_4_bits_are_for_linears_of_whole_groups():
    linear = candidate_schemes(LayerSpec("middle_block.1.proj_in", (64, 64)), int4=True)
    in_8_bits = {TOKEN, STATIC, WIDE, WEIGHT_ONLY, FP16}
    assert set(linear) == in_8_bits | {INT4_TOKEN, INT4_STATIC, INT4_WEIGHT_ONLY} and set(linear) <= set(TIME_PER_MAC)
    assert [linear[label].weight_bits for label in (INT4_TOKEN, INT4_STATIC, INT4_WEIGHT_ONLY)] == [4, 4, 4]
    for shape in ((64, 48), (64, 64, 3, 3)):
        assert not {INT4_TOKEN, INT4_STATIC, INT4_WEIGHT_ONLY} & set(
            candidate_schemes(LayerSpec("middle_block.1.proj_in", shape), int4=True)
        )


def test_plan_takes_4_bits_where_the_file_must_be_small_and_8_where_they_cost_most():
    names, generator = ("middle_block.1.proj_in", "middle_block.1.proj_out"), torch.Generator().manual_seed(1)
    weights = {name: torch.randn(64, 128, generator=generator) for name in names}
    observer = LayerObserver(128)
    observer.update(torch.randn(2, 200, 128, generator=generator), [4, 60])
    gains = dict(zip(names, (1.0, 100.0), strict=True))
    calibration = Calibration(dict.fromkeys(names, observer.statistics()), {}, {name: sensitivity(gain) for name, gain in gains.items()})
    specs = {name: LayerSpec(name, (64, 128)) for name in names}
    options = measure_options(specs, weights.__getitem__, calibration, UNIFORM, rounding=Rounding())
    small, large = (sum(stored_bytes(spec, Scheme(weight_bits=bits)) for spec in specs.values()) for bits in (4, 8))
    plan = make_plan(options, Budget(size_bytes=(small + large) // 2), UNIFORM, 0)
    assert [plan.recipe.schemes[name].weight_bits for name in names] == [4, 8]
    free = make_plan(options, Budget(size_bytes=large), UNIFORM, 0)
    assert [free.recipe.schemes[name].weight_bits for name in names] == [8, 8]
    assert small <= make_plan(options, Budget(size_bytes=small), UNIFORM, 0).size_bytes < plan.size_bytes < free.size_bytes


def test_stored_bytes_are_those_of_the_tensors():
    spec = LayerSpec("a", (32, 64))
    assert stored_bytes(spec, None) == 2 * 32 * 64
    assert stored_bytes(spec, Scheme()) == 32 * 64 + 32 * 4
    assert stored_bytes(spec, Scheme(activation=ActivationMode.STATIC, symmetric=False)) == 32 * 64 + 32 * 4 + 64 * 8
    assert unquantized_bytes({"a.weight": (32, 64), "a.bias": (32,), "n.weight": (8,)}, {"a": spec}) == 2 * 40


LAYERS = {name: LayerSpec(name, (16, 32)) for name in ("middle_block.1.proj_in", "middle_block.1.proj_out")}


def calibrated(probed: bool = True) -> Calibration:
    layers = {name: observed(name, 32, seed=index)[0].statistics() for index, name in enumerate(LAYERS)}
    return Calibration(layers, {}, {name: sensitivity(1.0, 16.0) for name in LAYERS} if probed else {})


def weight_of(name: str) -> torch.Tensor:
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(len(name)))


def test_measured_plan_becomes_a_recipe_that_survives_json():
    calibration = calibrated()
    static = {name: Scheme(activation=ActivationMode.STATIC) for name in LAYERS}
    grouping = choose_groups("optimal", 2, calibration, static)
    layers = measure_options(LAYERS, weight_of, calibration, grouping)
    plan = uniform_plan(layers, STATIC, grouping, other_bytes=100)
    recipe = Recipe.from_json(json.loads(json.dumps(plan.recipe.to_json())), "plan")
    assert recipe == plan.recipe and recipe.grouping == "optimal"
    assert recipe.groups_of("middle_block.1.proj_in") == grouping.layer_groups["middle_block.1.proj_in"]
    assert recipe.needs_calibration and plan.size_bytes == 100 + sum(one.find(STATIC).stored_bytes for one in layers)
    assert not uniform_plan(layers, TOKEN, grouping, 0).recipe.layer_groups


def test_protected_layers_stay_16_bit():
    layers = measure_options(LAYERS, weight_of, calibrated(), UNIFORM, protected=["*.proj_in"])
    plan = make_plan(layers, Budget(integer_share=0.5), UNIFORM, 0)
    assert plan.choices["middle_block.1.proj_in"] == FP16 and plan.choices["middle_block.1.proj_out"] != FP16
    with pytest.raises(PlanError, match=r"protected layer '\*\.ff': no layer of this model"):
        measure_options(LAYERS, weight_of, calibrated(), UNIFORM, protected=["*.ff"])


def test_plan_asks_for_sensitivity_when_it_was_not_measured():
    with pytest.raises(CalibrationError, match=r"proj_in: its sensitivity was not measured.*Calibrate again"):
        measure_options(LAYERS, weight_of, calibrated(probed=False), UNIFORM)
