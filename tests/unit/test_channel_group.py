"""channel_group: order and exponents found from statistics, int32 limit, refusals; k-means groups; the choice between modes."""

from __future__ import annotations

import itertools

import pytest
import torch

from stepquant.errors import SchemeError
from stepquant.quant.activation_choice import choose_activation, choose_grouping, granularities, measured_recipe
from stepquant.quant.activation_noise import output_sqnr_db, simulated_rows
from stepquant.quant.calibration import Calibration
from stepquant.quant.channel_group import (
    HEADROOM,
    ChannelGrouping,
    _best_levels,
    granularity_of,
    group_channels,
    grouped_statistics,
    max_groups,
    regrouped_weight,
    stored_grouping,
    weight_energy,
    within_int32,
)
from stepquant.quant.kmeans_groups import kmeans_groups
from stepquant.quant.observer import LayerObserver, LayerStatistics
from stepquant.quant.recipe import Recipe
from stepquant.quant.scheme import GRANULARITIES, ActivationMode, Scheme
from stepquant.quant.timestep import uniform_groups
from stepquant.quant.weight import quantize_weight

ONE_GROUP = uniform_groups(1)
LINEAR, CONV = "middle_block.1.transformer_blocks.0.attn1.to_q", "middle_block.0.in_layers.2"


def grouped(count: int, granularity: int = 8, base: ActivationMode = ActivationMode.STATIC, symmetric: bool = True) -> Scheme:
    return Scheme(
        activation=ActivationMode.CHANNEL_GROUP, symmetric=symmetric, channel_groups=count, granularity=granularity, group_base=base
    )


def observed(x: torch.Tensor) -> LayerStatistics:
    """Statistics of rows (R, K) that all came at one timestep."""
    observer = LayerObserver(x.shape[1])
    for part in x.split(16):
        observer.update(part[None], [20])
    return observer.statistics()


def channel_outliers(generator: torch.Generator, rows: int = 256, K: int = 320, factor: float = 30.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of which 13 in 1280 channels are `factor` times larger (research/kernels.md section b), and those channels."""
    x = torch.randn(rows, K, generator=generator)
    outliers = torch.randperm(K, generator=generator)[: max(1, K * 13 // 1280)]
    x[:, outliers] *= factor
    return x, outliers


def test_group_channels_puts_outliers_first_and_divides_them_by_their_ratio():
    magnitude = torch.tensor([1.0, 1, 16, 1, 1, 16, 1, 1])
    grouping = group_channels(magnitude, torch.ones(8), groups=2, granularity=2, layer="layer")
    assert grouping.order.tolist() == [2, 5, 0, 1, 3, 4, 6, 7]
    assert grouping.exponents.tolist() == [4, 0, 0, 0] and grouping.groups == 2
    assert grouping.by_channel().tolist() == [0, 0, 4, 0, 0, 4, 0, 0]


def test_group_channels_needs_no_more_groups_than_help():
    grouping = group_channels(torch.ones(64), torch.ones(64), groups=8, granularity=8, layer="layer")
    assert grouping.groups == 1 and not grouping.exponents.any()


def test_group_channels_keeps_channels_together_up_to_the_granularity():
    magnitude = torch.ones(128)
    magnitude[77] = 100
    grouping = group_channels(magnitude, torch.ones(128), groups=2, granularity=64, layer="layer")
    assert grouping.order[0] == 77
    # 2^7 would round the second block 1.6 times more finely, and the 63 channels beside the outlier twice as coarsely.
    assert grouping.exponents.tolist() == [6, 0]


@pytest.mark.parametrize("K", [320, 333, 64])
def test_grouping_is_undone_exactly_whatever_the_width(K, generator):
    x = torch.randn(5, K, generator=generator)
    grouping = group_channels(torch.rand(K, generator=generator) * 50, torch.ones(K), 4, 16, "layer")
    assert torch.equal(grouping.undo(grouping.apply(x)), x)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_best_levels_equal_an_exhaustive_search(groups, generator):
    depth = torch.cat([torch.zeros(1), torch.rand(5, generator=generator) * 6]).double().sort().values
    weight = torch.rand(6, generator=generator).double()
    noise, exponents = _best_levels(depth, weight, groups, 0.25)
    level = (depth + 0.25).floor().long()
    candidates = []
    for count in range(1, groups + 1):
        for chosen in itertools.combinations(sorted(set(level.tolist())), count):
            if chosen[0] == level[0]:
                held = torch.tensor([max(c for c in chosen if c <= n) for n in level.tolist()])
                candidates.append(float((weight * 4.0**-held).sum()))
    assert len(exponents.unique()) <= groups
    chosen_noise = float((weight * 4.0 ** (exponents.long() - exponents.long().max() - level[0])).sum())
    assert chosen_noise == pytest.approx(min(candidates))
    assert noise > 0


def test_group_channels_refuses_by_name_more_groups_than_channels_make():
    with pytest.raises(SchemeError, match=r"ff\.net\.2: 8 channel groups of 64 channels or more need 449 input channels, it has 320"):
        group_channels(torch.ones(320), torch.ones(320), 8, 64, "ff.net.2")


def test_grouping_is_cut_until_the_largest_possible_sum_fits_int32():
    codes = torch.full((2, 2560), 127, dtype=torch.int8)
    wide = ChannelGrouping(torch.arange(2560).int(), torch.tensor([10] + [0] * 39, dtype=torch.int8), 64)
    cut = within_int32(wide, codes, symmetric=False)
    # 127 * 255 * (64 * 2^e + 2496) < 2^31 holds up to e = 9.
    assert cut.exponents.tolist() == [9] + [0] * 39
    assert 127 * 255 * (64 * 2**9 + 2496) < 2**31 <= 127 * 255 * (64 * 2**10 + 2496)
    assert within_int32(wide, codes // 127, symmetric=True).exponents.max() == 10


def test_grouping_of_a_conv_counts_all_its_taps_against_int32():
    codes = torch.full((1, 3, 3, 640), 127, dtype=torch.int8)
    wide = ChannelGrouping(torch.arange(640).int(), torch.tensor([8] + [0] * 9, dtype=torch.int8), 64)
    largest = int(within_int32(wide, codes, symmetric=True).exponents.max())
    assert 9 * 127 * 127 * (64 * 2**largest + 576) < 2**31 <= 9 * 127 * 127 * (64 * 2 ** (largest + 1) + 576)


@pytest.mark.parametrize("shape", [(24, 160), (24, 160, 3, 3)], ids=["linear", "conv"])
def test_regrouped_weight_has_the_plain_codes_in_the_groups_order(shape, generator):
    weight = torch.randn(shape, generator=generator)
    grouping = ChannelGrouping(torch.randperm(160, generator=generator).int(), torch.tensor([3] + [0] * 9, dtype=torch.int8), 16)
    plain, found = quantize_weight(weight, "layer"), regrouped_weight(weight, grouping, False, "layer")
    assert torch.equal(found.scale, plain.scale) and torch.equal(found.codes, plain.codes[..., grouping.order.long()])


@pytest.mark.parametrize("symmetric", [False, True], ids=["zero_point", "symmetric"])
def test_regrouped_weight_widens_a_rows_scale_before_its_sum_can_pass_int32(symmetric, generator):
    # The exponents fit the first weight; the merged one is large in just the channels that are shifted by 10.
    grouping = ChannelGrouping(torch.arange(2560).int(), torch.tensor([10] + [0] * 39, dtype=torch.int8), 64)
    weight = torch.rand(3, 2560, generator=generator)
    weight[0, 64:] = weight[0, 64:].clamp_min(0.9)
    weight[1, :64] = 1.0
    weight[2, :64], weight[2, 64] = 0.01, 1.0
    found = regrouped_weight(weight, grouping, symmetric, "layer")
    factor = 2 ** grouping.by_position()
    worst = (found.codes.long().abs() * factor).sum(1) * (127 if symmetric else 255)
    assert int(worst.max()) < 2**31
    plain = quantize_weight(weight, "layer")
    assert torch.equal(found.codes[2], plain.codes[2]), "a row that fits is left alone"
    assert (found.scale[1] > plain.scale[1]) == (not symmetric)
    assert ((found.codes * found.scale[:, None] - weight).abs() <= 0.5001 * found.scale[:, None]).all()


def test_granularity_is_told_by_the_number_of_blocks():
    for K in (8, 40, 320, 640, 1280, 1920, 5120):
        for granularity in GRANULARITIES:
            blocks = max_groups(K, granularity)
            found = granularity_of(K, blocks)
            assert max_groups(K, found) == blocks and (found == granularity or blocks == 1)


@pytest.mark.parametrize(
    ("order", "exponents"),
    [([0, 0, 1, 2], [1, 0]), ([0, 1, 2, 3], [0, 1]), ([0, 1, 2, 3], [2, 1]), ([0, 1, 2, 3], [1, 0, 0]), ([0, 1, 2, 4], [1, 0])],
    ids=["twice", "ascending", "not down to 0", "too many blocks", "beyond K"],
)
def test_stored_grouping_is_none_when_damaged(order, exponents):
    assert stored_grouping(torch.tensor(order).int(), torch.tensor(exponents, dtype=torch.int8), 2) is None
    assert stored_grouping(torch.tensor([3, 0, 2, 1]).int(), torch.tensor([1, 0], dtype=torch.int8), 2).groups == 2


@pytest.mark.parametrize("base", [ActivationMode.TOKEN, ActivationMode.STATIC], ids=["token", "static"])
def test_channel_groups_recover_what_channel_outliers_cost(base, generator):
    # research/kernels.md, the same kind of input: 26.1 dB per token, 36.9 dB with power-of-two groups.
    x, _ = channel_outliers(generator, K=1280)
    statistics, weight = observed(x), torch.randn(128, 1280, generator=generator)
    scheme = grouped(8, 8, base)
    grouping = choose_grouping(LINEAR, statistics, weight, scheme, ONE_GROUP, False)
    rows = statistics.rows.float()

    def sqnr(one: Scheme, its_grouping: ChannelGrouping | None = None) -> float:
        return output_sqnr_db(rows, simulated_rows(statistics, one, ONE_GROUP, grouping=its_grouping), weight)

    plain = sqnr(Scheme()) if base is ActivationMode.TOKEN else sqnr(Scheme(activation=ActivationMode.STATIC))
    assert sqnr(scheme, grouping) > plain + 9
    assert grouping.groups >= 2


def test_grouped_statistics_describe_the_reordered_and_divided_input(generator):
    x, _ = channel_outliers(generator, 64, 32)
    grouping = group_channels(x.abs().amax(0), torch.ones(32), 2, 8, "layer")
    direct, moved = observed(grouping.apply(x)), grouped_statistics(observed(x), grouping, headroom=1.0)
    assert torch.equal(grouped_statistics(observed(x), grouping).range_max, HEADROOM * direct.range_max)
    assert torch.equal(moved.range_max, direct.range_max) and torch.equal(moved.range_min, direct.range_min)
    assert torch.allclose(moved.rows, direct.rows.float(), rtol=1e-3)


def test_weight_energy_sums_over_output_channels_and_taps():
    assert weight_energy(torch.tensor([[1.0, 2.0], [3.0, 0.0]])).tolist() == [10, 4]
    assert weight_energy(torch.ones(5, 2, 3, 3)).tolist() == [45, 45]


def test_kmeans_groups_find_separate_clusters_and_their_ranges():
    low = torch.tensor([-1.0, -1.1, -50, -49, -1.05, -0.9])
    groups = kmeans_groups(low, -low * 2, 2)
    assert groups.label[2] == groups.label[3] != groups.label[0]
    assert torch.equal(groups.label[[0, 1, 4, 5]], groups.label[0].expand(4))
    assert sorted(groups.high.tolist()) == pytest.approx([2.2, 100.0])


def test_kmeans_groups_leave_an_error_of_half_a_step(generator):
    x, _ = channel_outliers(generator)
    groups = kmeans_groups(x.amin(0), x.amax(0), 8)
    step = ((groups.high - groups.low) / 255)[groups.label]
    assert bool(((groups.quantized(x, 8) - x).abs() <= step).all())  # a zero point is rounded too


def test_kmeans_groups_are_fewer_when_channels_are_alike():
    groups = kmeans_groups(torch.tensor([-1.0, -1, -2, -2]), torch.tensor([1.0, 1, 2, 2]), 4)
    assert len(groups.low) == 2


def test_choose_activation_takes_channel_groups_for_channel_outliers(generator):
    x, _ = channel_outliers(generator)
    choice = choose_activation(LINEAR, observed(x), torch.randn(64, 320, generator=generator), ONE_GROUP, 4, 8)
    assert choice.scheme.is_grouped and choice.groups >= 2 and choice.granularity == 8
    assert choice.sqnr_db["channel_group of 8 on token"] > choice.sqnr_db["token"] + 9


def test_choose_activation_takes_finer_groups_only_where_they_gain_enough(generator):
    x = torch.randn(256, 320, generator=generator)
    x[:, :16] *= 60  # one block of 16, two of 8
    weight = torch.randn(64, 320, generator=generator)
    assert choose_activation(LINEAR, observed(x), weight, ONE_GROUP, 4, 8).granularity == 16
    x[:, 8:16] /= 60  # half of a block of 16 is wasted, which costs nothing much: its channels share the outliers' scale
    x[:, 40:48] *= 60
    x[:, 80:88] *= 60
    sizes = {size: choose_activation(LINEAR, observed(x), weight, ONE_GROUP, 4, size).granularity for size in (8, 128)}
    assert sizes == {8: 16, 128: 128}
    assert granularities(64) == (128, 64) and granularities(128) == (128,) and granularities(8) == (16, 8)


def test_choose_activation_of_static_modes_alone_offers_no_dynamic_scale(generator):
    x = torch.randn(256, 320, generator=generator)
    weight = torch.randn(64, 320, generator=generator)
    static = choose_activation(LINEAR, observed(x), weight, ONE_GROUP, 4, 8, modes=(ActivationMode.STATIC,))
    assert static.scheme.is_static and all(name.endswith("static") for name in static.sqnr_db)


def test_output_sqnr_is_the_mean_of_the_buckets_decibels():
    rows, buckets = torch.tensor([[100.0], [1.0]]), torch.tensor([9, 3])
    noisy = torch.tensor([[110.0], [1.01]])
    assert output_sqnr_db(rows, noisy, torch.ones(1, 1), buckets) == pytest.approx((20 + 40) / 2, abs=1e-3)
    assert output_sqnr_db(rows, noisy, torch.ones(1, 1)) == pytest.approx(20, abs=0.01)


def test_choose_activation_takes_token_for_row_outliers(generator):
    x = torch.randn(256, 320, generator=generator)
    x[::10] *= 40
    choice = choose_activation(LINEAR, observed(x), torch.randn(64, 320, generator=generator), ONE_GROUP, 4, 8)
    assert choice.scheme == Scheme() and choice.groups == 1


def test_choose_activation_takes_static_where_a_zero_point_pays(generator):
    x = torch.nn.functional.silu(torch.randn(256, 64, generator=generator))
    layer = LINEAR.replace("attn1.to_q", "ff.net.2")
    choice = choose_activation(layer, observed(x), torch.randn(32, 64, generator=generator), ONE_GROUP, 4, 8)
    assert choice.scheme.activation is ActivationMode.STATIC and not choice.scheme.symmetric


def test_choose_activation_gives_a_dynamic_convolution_after_silu_a_zero_point(generator):
    x = torch.nn.functional.silu(torch.randn(256, 64, generator=generator))
    weight = torch.randn(32, 64, 3, 3, generator=generator)
    choice = choose_activation(CONV, observed(x), weight, ONE_GROUP, 4, 8)
    symmetric = output_sqnr_db(x.half().float(), simulated_rows(observed(x), Scheme(), ONE_GROUP, is_conv=True), weight)
    assert choice.scheme == Scheme(symmetric=False) and choice.sqnr_db["token"] > symmetric + 4


def test_choose_activation_keeps_rows_scales_where_tokens_need_them(generator):
    x, _ = channel_outliers(generator)
    layer = LINEAR.replace("attn1.to_q", "attn2.to_k")
    choice = choose_activation(layer, observed(x), torch.randn(64, 320, generator=generator), ONE_GROUP, 4, 8)
    assert choice.scheme == Scheme() and list(choice.sqnr_db) == ["token"]


def test_measured_recipe_survives_json(generator):
    x, _ = channel_outliers(generator)
    weight = torch.randn(64, 320, generator=generator)
    recipe, choices = measured_recipe(Calibration({LINEAR: observed(x)}), lambda name: weight, {LINEAR: None}, 16, 64, 4)
    assert recipe.schemes[LINEAR].channel_groups == 5 == 320 // 64  # as many as K allows
    assert choices[LINEAR].groups <= 5
    assert recipe.needs_calibration
    assert Recipe.from_json(recipe.to_json(), "test") == recipe


@pytest.mark.parametrize("change", [{"channel_groups": 0}, {"channel_groups": 17}, {"granularity": 48}, {"group_base": "fp16"}], ids=str)
def test_scheme_names_the_layer_when_groups_are_unknown(change):
    with pytest.raises(SchemeError, match=LINEAR):
        Scheme.from_json(grouped(4).to_json() | change, LINEAR)


def test_scheme_without_groups_writes_none_of_their_fields():
    assert set(Scheme().to_json()) == {"weight_bits", "activation", "symmetric", "compute"}
