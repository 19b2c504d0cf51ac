"""Line plots as pictures: values per step with mean and worst marked, or values over any x. Not a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw

from .palette import GRID, INK, MUTED, PAPER, SERIES, font

# Drawn this much larger and then shrunk, because Pillow's lines are not antialiased.
OVERSAMPLING = 3
LEFT, TOP, RIGHT, BOTTOM = 74, 78, 28, 58
LEGEND_ROWS, LEGEND_WIDTH = 4, 150


@dataclass(frozen=True)
class Series:
    """values: one per step, in order; a value that is not finite leaves a gap."""

    label: str
    values: Sequence[float]


@dataclass(frozen=True)
class Curve:
    """x, y: one per point, in order; drawn as a line, as steps that hold until the next x, or as a single marked point."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    stepped: bool = False


@dataclass(frozen=True)
class _Axes:
    """Maps (x, value) to pixels of the oversampled canvas; x is the step in a plot over steps."""

    width: int
    height: int
    first: float
    last: float
    low: float
    high: float

    def point(self, x: float, value: float) -> tuple[float, float]:
        across = 0.5 if self.last == self.first else (x - self.first) / (self.last - self.first)
        up = (value - self.low) / (self.high - self.low)
        x = LEFT + across * (self.width - LEFT - RIGHT)
        y = self.height - BOTTOM - up * (self.height - TOP - BOTTOM)
        return x * OVERSAMPLING, y * OVERSAMPLING


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round values covering low..high, for example 31.2..44.9 -> 30, 35, 40, 45."""
    if high - low < 1e-9:
        low, high = low - 1, high + 1
    raw = (high - low) / max(1, most - 2)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    spacing = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / spacing + 1e-9), math.ceil(high / spacing - 1e-9)
    return [index * spacing for index in range(first, last + 1)]


def draw_line_plot(
    title: str, y_label: str, series: Sequence[Series], x_label: str = "step", width: int = 960, height: int = 480
) -> Image.Image:
    """Draw series over 1-based steps.

    Args:
        title, y_label: ASCII (see palette.font).
    Returns: an RGB picture of width x height pixels. If nothing is finite, the plot says so instead.
    """
    canvas = Image.new("RGB", (width * OVERSAMPLING, height * OVERSAMPLING), PAPER)
    draw = ImageDraw.Draw(canvas)
    _text(draw, (LEFT, 16), title, 20, INK)
    _text(draw, (LEFT, 46), y_label, 14, MUTED)
    values = [value for one in series for value in one.values if math.isfinite(value)]
    if values:
        ticks = nice_ticks(min(values), max(values))
        steps = max(len(one.values) for one in series)
        axes = _Axes(width, height, 0, steps - 1, ticks[0], ticks[-1])
        every = max(1, math.ceil(steps / 20))
        _draw_axes(draw, axes, ticks, {step: str(step + 1) for step in range(0, steps, every)}, x_label)
        for index, one in enumerate(series):
            _draw_series(draw, axes, one, SERIES[index % len(SERIES)])
        _draw_legend(draw, width, series)
    else:
        _text(draw, (width / 2, height / 2), "no finite value: the outputs are equal, or broken", 18, MUTED, "mm")
    return canvas.resize((width, height), Image.Resampling.LANCZOS)


def draw_curves(title: str, x_label: str, y_label: str, curves: Sequence[Curve], width: int = 960, height: int = 480) -> Image.Image:
    """Draw curves over a common x axis, with a legend right of the title.

    Args:
        title, x_label, y_label: ASCII (see palette.font). curves: finite values only.
    Returns: an RGB picture of width x height pixels. Without a point it says so instead.
    """
    canvas = Image.new("RGB", (width * OVERSAMPLING, height * OVERSAMPLING), PAPER)
    draw = ImageDraw.Draw(canvas)
    _text(draw, (LEFT, 16), title, 20, INK)
    _text(draw, (LEFT, 46), y_label, 14, MUTED)
    xs, ys = [value for one in curves for value in one.x], [value for one in curves for value in one.y]
    if xs:
        x_ticks, ticks = nice_ticks(min(xs), max(xs), 10), nice_ticks(min(ys), max(ys))
        axes = _Axes(width, height, x_ticks[0], x_ticks[-1], ticks[0], ticks[-1])
        _draw_axes(draw, axes, ticks, {tick: f"{tick:g}" for tick in x_ticks}, x_label)
        for index, one in enumerate(curves):
            colour = SERIES[index % len(SERIES)]
            _draw_curve(draw, axes, one, colour)
            column, row = divmod(index, LEGEND_ROWS)
            _text(draw, (width - RIGHT - LEGEND_WIDTH * column, 14 + 16 * row), one.label, 13, colour, "ra")
    else:
        _text(draw, (width / 2, height / 2), "nothing to draw", 18, MUTED, "mm")
    return canvas.resize((width, height), Image.Resampling.LANCZOS)


def _draw_curve(draw: ImageDraw.ImageDraw, axes: _Axes, curve: Curve, colour: tuple[int, int, int]) -> None:
    points = [axes.point(x, y) for x, y in zip(curve.x, curve.y, strict=True)]
    if curve.stepped:
        points = [corner for (x, y), (next_x, _) in pairwise(points) for corner in ((x, y), (next_x, y))] + points[-1:]
    if len(points) == 1:
        _draw_dot(draw, points[0], 7.0, colour, PAPER)
        return
    draw.line(points, fill=colour, width=int(2.5 * OVERSAMPLING), joint="curve")
    if not curve.stepped:
        for point in points:
            _draw_dot(draw, point, 3.5, colour)


def _draw_axes(draw: ImageDraw.ImageDraw, axes: _Axes, ticks: Sequence[float], x_ticks: dict[float, str], x_label: str) -> None:
    for tick in ticks:
        left, y = axes.point(axes.first, tick)
        left, right = LEFT * OVERSAMPLING, (axes.width - RIGHT) * OVERSAMPLING
        draw.line([(left, y), (right, y)], fill=GRID, width=OVERSAMPLING)
        _text(draw, (LEFT - 10, y / OVERSAMPLING), f"{tick:g}", 14, MUTED, "rm")
    for place, label in x_ticks.items():
        x = axes.point(place, axes.low)[0] / OVERSAMPLING
        _text(draw, (x, axes.height - BOTTOM + 10), label, 14, MUTED, "mt")
    middle = (LEFT + axes.width - RIGHT) / 2
    _text(draw, (middle, axes.height - 12), x_label, 14, MUTED, "mb")


def _draw_series(draw: ImageDraw.ImageDraw, axes: _Axes, series: Series, colour: tuple[int, int, int]) -> None:
    finite = [(step, value) for step, value in enumerate(series.values) if math.isfinite(value)]
    if not finite:
        return
    mean = sum(value for _, value in finite) / len(finite)
    _draw_dashes(draw, axes, mean, colour)
    for (step, value), (next_step, next_value) in pairwise(finite):
        if next_step == step + 1:
            ends = [axes.point(step, value), axes.point(next_step, next_value)]
            draw.line(ends, fill=colour, width=int(2.5 * OVERSAMPLING), joint="curve")
    for step, value in finite:
        _draw_dot(draw, axes.point(step, value), 3.5, colour)
    worst_step, worst = min(finite, key=lambda pair: pair[1])
    _draw_dot(draw, axes.point(worst_step, worst), 6.0, colour, PAPER)


def _draw_dot(
    draw: ImageDraw.ImageDraw,
    centre: tuple[float, float],
    radius: float,
    colour: tuple[int, int, int],
    fill: tuple[int, int, int] | None = None,
) -> None:
    r = radius * OVERSAMPLING
    x, y = centre
    draw.ellipse([x - r, y - r, x + r, y + r], fill=fill or colour, outline=colour, width=2 * OVERSAMPLING)


def _draw_dashes(draw: ImageDraw.ImageDraw, axes: _Axes, value: float, colour: tuple[int, int, int]) -> None:
    pale = tuple((channel + 2 * 255) // 3 for channel in colour)
    y = axes.point(0, value)[1]
    for x in range(LEFT, axes.width - RIGHT, 12):
        ends = [(x * OVERSAMPLING, y), (min(x + 7, axes.width - RIGHT) * OVERSAMPLING, y)]
        draw.line(ends, fill=pale, width=int(1.5 * OVERSAMPLING))


def _draw_legend(draw: ImageDraw.ImageDraw, width: int, series: Sequence[Series]) -> None:
    """Right of the title, one line per series: label, mean (dashed in the plot) and worst (ring in the plot)."""
    for index, one in enumerate(series):
        finite = [value for value in one.values if math.isfinite(value)]
        if finite:
            label = f"{one.label}   mean {sum(finite) / len(finite):.1f}   worst {min(finite):.1f}"
            _text(draw, (width - RIGHT, 18 + 20 * index), label, 15, SERIES[index % len(SERIES)], "ra")


def _text(
    draw: ImageDraw.ImageDraw,
    position: tuple[float, float],
    text: str,
    size: int,
    colour: tuple[int, int, int],
    anchor: str = "la",
) -> None:
    place = (position[0] * OVERSAMPLING, position[1] * OVERSAMPLING)
    draw.text(place, text, fill=colour, font=font(size * OVERSAMPLING), anchor=anchor)
