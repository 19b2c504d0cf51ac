"""The plot that Compare draws with Pillow."""

import math

import pytest

from stepquant.nodes.line_plot import Series, draw_line_plot, nice_ticks
from stepquant.nodes.palette import SERIES


def is_line(pixel) -> bool:
    """The series' colour, up to antialiasing."""
    return all(abs(found - wanted) < 60 for found, wanted in zip(pixel, SERIES[0], strict=True))


def line_pixels(picture) -> int:
    return sum(count for count, found in picture.getcolors(picture.width * picture.height) if is_line(found))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(31.2, 44.9, [30, 35, 40, 45]), (0.001, 0.0042, [0.001, 0.002, 0.003, 0.004, 0.005]), (-3.0, 3.0, [-4, -2, 0, 2, 4])],
)
def test_nice_ticks_are_round_and_cover_the_values(low, high, expected):
    assert nice_ticks(low, high) == pytest.approx(expected)


def test_nice_ticks_surround_a_single_value():
    ticks = nice_ticks(40.0, 40.0)
    assert ticks[0] < 40 < ticks[-1]


def test_draw_line_plot_has_the_asked_size_and_a_line():
    picture = draw_line_plot("title", "dB", [Series("w8a8-token", [40.0, 42.5, 39.0])], width=640, height=320)
    assert picture.size == (640, 320) and picture.mode == "RGB"
    assert line_pixels(picture) > 600


def test_draw_line_plot_draws_higher_values_higher():
    picture = draw_line_plot("", "", [Series("", [10.0, 20.0])])
    left = [y for y in range(80, 420) if is_line(picture.getpixel((90, y)))]
    right = [y for y in range(80, 420) if is_line(picture.getpixel((915, y)))]
    assert min(left) > max(right)


@pytest.mark.parametrize("values", [[], [math.inf, math.inf], [math.nan]], ids=["none", "equal", "broken"])
def test_draw_line_plot_says_so_when_nothing_is_finite(values):
    picture = draw_line_plot("title", "dB", [Series("x", values)])
    assert line_pixels(picture) == 0
    middle = picture.crop((200, 200, 760, 280))
    assert len(middle.getcolors(middle.width * middle.height)) > 1, "no sentence in the middle"


@pytest.mark.parametrize("values", [[40.0], [40.0, math.inf, 41.0]], ids=["one step", "a gap"])
def test_draw_line_plot_draws_what_is_finite(values):
    assert line_pixels(draw_line_plot("title", "dB", [Series("x", values)])) > 0
