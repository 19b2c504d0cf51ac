"""A labelled grid of pictures with a line of figures below: rows are seeds, columns are models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .palette import INK, MUTED, PAPER, font

MARGIN, GAP, HEADER, LABEL, LINE = 20, 10, 40, 26, 26
LARGEST_CELL = 512
SMALLEST_CELL = 192


@dataclass(frozen=True)
class Row:
    """pictures: one per column. label: ASCII, written below the row's first picture."""

    label: str
    pictures: Sequence[Image.Image]


def draw_picture_grid(columns: Sequence[str], rows: Sequence[Row], lines: Sequence[str] = ()) -> Image.Image:
    """Put pictures of one size in a grid.

    Args:
        columns: ASCII headings, one per picture of a row.
        rows: at least one; pictures are shrunk to at most 512 pixels a side, and small ones enlarged in whole steps.
        lines: ASCII text below the grid, one line each.
    Returns: an RGB picture.
    """
    cell_width, cell_height = _cell_size(rows[0].pictures[0].size)
    width = 2 * MARGIN + len(columns) * cell_width + (len(columns) - 1) * GAP
    height = MARGIN + HEADER + len(rows) * (cell_height + LABEL + GAP) + len(lines) * LINE + MARGIN
    longest = max((font(15).getlength(line) for line in lines), default=0)
    sheet = Image.new("RGB", (max(width, int(longest) + 2 * MARGIN), height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(columns):
        centre = MARGIN + column * (cell_width + GAP) + cell_width / 2
        draw.text((centre, MARGIN + HEADER / 2), heading, fill=INK, font=font(18), anchor="mm")
    y = MARGIN + HEADER
    for row in rows:
        for column, picture in enumerate(row.pictures):
            cell = _fit(picture, (cell_width, cell_height))
            sheet.paste(cell, (MARGIN + column * (cell_width + GAP), y))
        draw.text((MARGIN, y + cell_height + 5), row.label, fill=MUTED, font=font(14))
        y += cell_height + LABEL + GAP
    for line in lines:
        draw.text((MARGIN, y), line, fill=INK, font=font(15))
        y += LINE
    return sheet


def _cell_size(picture: tuple[int, int]) -> tuple[int, int]:
    longest = max(picture)
    if longest > LARGEST_CELL:
        return tuple(max(1, round(side * LARGEST_CELL / longest)) for side in picture)
    # Whole steps, so that the pixels of a small model's picture stay square and sharp.
    enlarge = -(-SMALLEST_CELL // longest) if longest < SMALLEST_CELL else 1
    return picture[0] * enlarge, picture[1] * enlarge


def _fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    larger = size[0] > picture.width
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)
