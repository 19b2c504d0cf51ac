"""The pictures of a plan: sensitivity map of the UNet, size and quality, SQNR over t, static scales over t. Pillow only."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median

from PIL import Image, ImageDraw

from ..quant.calibration import Calibration
from ..quant.layer_noise import FP16, WIDE
from ..quant.plan import Plan
from ..quant.timestep import NUM_BUCKETS, NUM_TIMESTEPS
from .line_plot import OVERSAMPLING, Curve, draw_curves
from .palette import GRID, INK, MUTED, PAPER, font

# Last parts of a layer's name -> what it does, in the order of the map's rows.
KINDS = {
    "in_layers.2": "conv 1",
    "emb_layers.1": "timestep embedding",
    "out_layers.3": "conv 2",
    "skip_connection": "skip 1x1",
    "op": "downsample",
    "conv": "upsample",
    "proj_in": "proj in",
    "attn1.to_q": "self q",
    "attn1.to_k": "self k",
    "attn1.to_v": "self v",
    "attn1.to_out.0": "self out",
    "attn2.to_q": "cross q",
    "attn2.to_k": "cross k",
    "attn2.to_v": "cross v",
    "attn2.to_out.0": "cross out",
    "ff.net.0.proj": "ff in",
    "ff.net.2": "ff out",
    "proj_out": "proj out",
}
CELL, LABELS, HEADER = 38, 170, 96
# Share of the noise that is drawn in the darkest colour; the scale is logarithmic below it.
DARKEST_SHARE, PALEST_SHARE = 0.05, 1e-5
DARK = (178, 24, 43)


def plan_pictures(plan: Plan, calibration: Calibration) -> list[Image.Image]:
    """The four pictures, in the order of the module's title."""
    return [draw_sensitivity_map(plan), draw_frontier(plan), draw_sqnr_over_t(plan), draw_scales_over_t(plan, calibration)]


def draw_sensitivity_map(plan: Plan) -> Image.Image:
    """Rows are kinds of layers, columns the UNet's blocks; colour is the share of the output's noise, the letter the scheme."""
    cells: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in plan.choices:
        cells[_kind(name), _block(name)].append(name)
    columns = sorted({column for _, column in cells}, key=_block_order)
    rows = [kind for kind in dict.fromkeys([*KINDS.values(), *(row for row, _ in cells)]) if any(row == kind for row, _ in cells)]
    width, height = LABELS + CELL * len(columns) + 24, HEADER + CELL * len(rows) + 44
    canvas = Image.new("RGB", (width * OVERSAMPLING, height * OVERSAMPLING), PAPER)
    draw = ImageDraw.Draw(canvas)
    _text(draw, (16, 14), "Where the noise comes from", 20, INK)
    _text(
        draw, (16, 44), "colour: share of the UNet output's noise; s static, t token, c channel group, w 8-bit weight alone, 16", 13, MUTED
    )
    for column, block in enumerate(columns):
        _text(draw, (LABELS + CELL * (column + 0.5), HEADER - 14), block, 12, MUTED, "mm")
    for row, kind in enumerate(rows):
        _text(draw, (LABELS - 10, HEADER + CELL * (row + 0.5)), kind, 13, INK, "rm")
        for column, block in enumerate(columns):
            _draw_cell(draw, LABELS + CELL * column, HEADER + CELL * row, cells.get((kind, block), []), plan)
    _text(draw, (16, height - 28), f"darkest: {100 * DARKEST_SHARE:.0f} % of the noise and more in one cell", 13, MUTED)
    return canvas.resize((width, height), Image.Resampling.LANCZOS)


def draw_frontier(plan: Plan) -> Image.Image:
    """Predicted SQNR over size, a curve per share of integer multiply-adds, and the chosen plan."""
    curves = []
    for share in dict.fromkeys(point.integer_share for point in plan.frontier):
        points = sorted({(point.size_bytes / 1e6, point.sqnr_db) for point in plan.frontier if point.integer_share == share})
        curves.append(Curve(f"{100 * share:.0f} % integer", [x for x, _ in points], [y for _, y in points]))
    curves.append(Curve("chosen", [plan.size_bytes / 1e6], [plan.mean_db]))
    return draw_curves("Size and predicted quality", "UNet file in MB", "predicted SQNR in dB, higher is better", curves)


def draw_sqnr_over_t(plan: Plan) -> Image.Image:
    """Predicted SQNR of the UNet's output over the timestep."""
    curve = Curve("predicted", [_timestep(bucket) for bucket in plan.buckets], plan.sqnr_db)
    return draw_curves(
        "Predicted SQNR over the schedule", "timestep t (sampling goes from right to left)", "SQNR of the UNet's output in dB", [curve]
    )


def draw_scales_over_t(plan: Plan, calibration: Calibration) -> Image.Image:
    """Static scales over the timestep, relative to each layer's largest: the median of every kind. Steps are groups."""
    by_kind: dict[str, list[Sequence[float]]] = defaultdict(list)
    for name, scheme in plan.recipe.schemes.items():
        if scheme.is_static and not scheme.is_grouped:
            scale = calibration.tables(name, scheme, plan.recipe.groups_of(name)).scale
            by_kind[_family(name)].append((scale / scale.max()).tolist())
    x = [_timestep(bucket - 0.5) for bucket in range(NUM_BUCKETS)]
    curves = [Curve(kind, x, [median(values) for values in zip(*tables, strict=True)], stepped=True) for kind, tables in by_kind.items()]
    return draw_curves(
        f"Static scales over the schedule: {plan.recipe.grouping}",
        "timestep t (sampling goes from right to left)",
        "scale, relative to the largest",
        curves,
    )


def _draw_cell(draw: ImageDraw.ImageDraw, x: float, y: float, names: Sequence[str], plan: Plan) -> None:
    box = [(x + 1) * OVERSAMPLING, (y + 1) * OVERSAMPLING, (x + CELL - 1) * OVERSAMPLING, (y + CELL - 1) * OVERSAMPLING]
    if not names:
        draw.rectangle(box, outline=GRID, width=OVERSAMPLING)
        return
    share = sum(plan.noise_share[name] for name in names)
    depth = math.log(max(share, PALEST_SHARE) / PALEST_SHARE) / math.log(DARKEST_SHARE / PALEST_SHARE)
    depth = min(1.0, depth)
    draw.rectangle(box, fill=tuple(round(255 + (dark - 255) * depth) for dark in DARK))
    letters = {_letter(plan.choices[name]) for name in names}
    _text(draw, (x + CELL / 2, y + CELL / 2), letters.pop() if len(letters) == 1 else "mix", 13, INK if depth < 0.6 else PAPER, "mm")


def _letter(label: str) -> str:
    whole = {FP16: "16", WIDE: "2x"}
    return whole.get(label) or ("4" if label.startswith("w4") else label[0])


def _kind(name: str) -> str:
    return next((kind for end, kind in KINDS.items() if name.endswith("." + end)), name.rsplit(".", 1)[-1])


def _family(name: str) -> str:
    """Fewer kinds than the map has: a plot holds seven curves."""
    kind = _kind(name)
    families: Mapping[str, str] = {"self": "attention in", "cross": "attention in", "proj": "proj", "conv": "conv after SiLU"}
    if kind.endswith(" out") and kind.split()[0] in ("self", "cross"):
        return "attention out"
    if kind in ("downsample", "upsample", "skip 1x1"):
        return "other conv"
    return families.get(kind.split()[0], kind)


def _block(name: str) -> str:
    """i4, m1 or o2: where in the UNet."""
    part = re.match(r"(input|output)_blocks\.(\d+)|middle_block\.(\d+)", name)
    if part is None:
        return "other"
    return f"m{part[3]}" if part[1] is None else f"{part[1][0]}{part[2]}"


def _block_order(block: str) -> tuple[int, int]:
    number = re.sub(r"\D", "", block)
    return "imo".find(block[0]) if number else 3, int(number or 0)


def _timestep(bucket: float) -> float:
    """The middle of a bucket."""
    return (bucket + 0.5) * NUM_TIMESTEPS / NUM_BUCKETS


def _text(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, colour: tuple[int, int, int], anchor: str = "la"
) -> None:
    draw.text((place[0] * OVERSAMPLING, place[1] * OVERSAMPLING), text, fill=colour, font=font(size * OVERSAMPLING), anchor=anchor)
