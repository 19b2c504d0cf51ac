"""The pictures of a plan: each shows what it says, for any UNet and any grouping."""

import pytest
import torch

from stepquant.nodes.line_plot import Curve, draw_curves
from stepquant.nodes.palette import PAPER, SERIES
from stepquant.nodes.plan_plots import draw_sensitivity_map, plan_pictures
from stepquant.quant.calibration import Calibration
from stepquant.quant.grouping import choose_groups
from stepquant.quant.layers import LayerSpec
from stepquant.quant.observer import LayerObserver
from stepquant.quant.plan import Plan, make_plan, measure_options
from stepquant.quant.plan_program import Budget
from stepquant.quant.scheme import ActivationMode, Scheme
from stepquant.quant.sensitivity import LayerSensitivity

NAMES = (
    "input_blocks.1.0.in_layers.2",
    "middle_block.1.transformer_blocks.0.attn1.to_q",
    "output_blocks.0.1.transformer_blocks.0.ff.net.2",
    "output_blocks.0.0.skip_connection",
)


def calibration() -> Calibration:
    layers, sensitivity = {}, {}
    for index, name in enumerate(NAMES):
        observer = LayerObserver(channels=32)
        for bucket in (3, 30, 60):
            observer.update(torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(bucket)) * bucket, [bucket])
        layers[name] = observer.statistics()
        sensitivity[name] = LayerSensitivity(torch.tensor([30]), torch.tensor([10.0**-index]), torch.tensor([16.0]))
    return Calibration(layers, {}, sensitivity)


def plan_of(found: Calibration, method: str) -> Plan:
    grouping = choose_groups(method, 3, found, {name: Scheme(activation=ActivationMode.STATIC) for name in NAMES})
    specs = {name: LayerSpec(name, (16, 32)) for name in NAMES}
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    options = measure_options(specs, lambda name: weight, found, grouping)
    return make_plan(options, Budget(), grouping, 1000, with_frontier=True)


def pixels(picture, colour) -> int:
    counts = picture.getcolors(picture.width * picture.height)
    return sum(count for count, found in counts if all(abs(a - b) < 40 for a, b in zip(found, colour, strict=True)))


@pytest.mark.parametrize("method", ["uniform", "optimal", "curve"])
def test_plan_has_four_pictures(method):
    found = calibration()
    pictures = plan_pictures(plan_of(found, method), found)
    assert len(pictures) == 4
    for picture in pictures:
        assert picture.mode == "RGB" and len(picture.getcolors(picture.width * picture.height)) > 10


def test_sensitivity_map_is_darkest_where_the_noise_is():
    plan = plan_of(calibration(), "uniform")
    assert max(plan.noise_share, key=plan.noise_share.get) == NAMES[0]
    picture = draw_sensitivity_map(plan)
    # Columns i1, m1, o0; rows conv 1, skip, self q, ff out; cells of 38 pixels from (170, 96).
    corner = {"i1 conv 1": (176, 102), "o0 skip": (176 + 2 * 38, 102 + 38), "nothing": (176 + 38, 102)}
    red = {name: picture.getpixel(place)[1] for name, place in corner.items()}
    assert red["i1 conv 1"] < red["o0 skip"] < red["nothing"] == PAPER[1]


def test_draw_curves_steps_hold_until_the_next_x():
    stepped = draw_curves("", "", "", [Curve("a", [0, 10, 20], [0.0, 10.0, 10.0], stepped=True)])
    straight = draw_curves("", "", "", [Curve("a", [0, 10, 20], [0.0, 10.0, 10.0])])
    assert stepped.size == straight.size == (960, 480)
    assert pixels(stepped, SERIES[0]) > pixels(straight, SERIES[0]) + 300, "the corner is longer than the diagonal"


def test_draw_curves_marks_a_single_point_and_says_so_when_there_is_none():
    assert pixels(draw_curves("", "", "", [Curve("", [1.0], [2.0])]), SERIES[0]) > 30
    assert pixels(draw_curves("", "", "", []), SERIES[0]) == 0
