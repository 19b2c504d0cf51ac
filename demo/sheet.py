"""Draws a picture sheet: one row per prompt, one column per format, with figures. Measures nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

# Everything is laid out for 256-pixel pictures; larger ones are scaled down to this side, smaller ones stay.
PICTURE_SIDE = 256
MARGIN = 40
GAP = 18
CAPTION_WIDTH = 212
HEAD_HEIGHT = 96
COLUMN_HEAD_HEIGHT = 66
NOTE_HEIGHT = 24
ROW_GAP = 16
FOOT_LINE = 19
CORNER = 10

PAPER = (250, 250, 248)
INK = (28, 30, 33)
GREY = (110, 114, 120)
LINE = (222, 222, 218)


@dataclass(frozen=True)
class Column:
    """subtitle: one short line of figures below the title."""

    title: str
    subtitle: str


@dataclass(frozen=True)
class Row:
    """One picture and one note per column, in the columns' order; an empty note leaves its line blank."""

    caption: str
    pictures: Sequence[Image.Image]
    notes: Sequence[str]


def draw_sheet(title: str, subtitle: str, columns: Sequence[Column], rows: Sequence[Row], footer: Sequence[str] = ()) -> Image.Image:
    """The sheet as an RGB image; footer: lines of small print."""
    width = 2 * MARGIN + CAPTION_WIDTH + len(columns) * (GAP + PICTURE_SIDE)
    row_height = PICTURE_SIDE + NOTE_HEIGHT + ROW_GAP
    foot_height = len(footer) * FOOT_LINE + (GAP if footer else 0)
    height = MARGIN + HEAD_HEIGHT + COLUMN_HEAD_HEIGHT + len(rows) * row_height + foot_height + MARGIN - ROW_GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, fill=INK, font=_font(34))
    draw.text((MARGIN, MARGIN + 48), subtitle, fill=GREY, font=_font(17))
    top = MARGIN + HEAD_HEIGHT
    for index, column in enumerate(columns):
        left = _column_left(index)
        draw.text((left, top), column.title, fill=INK, font=_font(22))
        draw.text((left, top + 31), column.subtitle, fill=GREY, font=_font(15))
    top += COLUMN_HEAD_HEIGHT
    for row in rows:
        _draw_row(sheet, draw, row, top)
        top += row_height
    top += GAP - ROW_GAP
    if footer:
        draw.line((MARGIN, top - 4, width - MARGIN, top - 4), fill=LINE, width=1)
    for index, line in enumerate(footer):
        draw.text((MARGIN, top + 6 + index * FOOT_LINE), line, fill=GREY, font=_font(14))
    return sheet


def _draw_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, row: Row, top: int) -> None:
    font = _font(19)
    lines = wrap(row.caption, font, CAPTION_WIDTH - 8)
    text_height = len(lines) * 26
    for number, line in enumerate(lines):
        draw.text((MARGIN, top + (PICTURE_SIDE - text_height) // 2 + number * 26), line, fill=INK, font=font)
    for index, (picture, note) in enumerate(zip(row.pictures, row.notes, strict=True)):
        left = _column_left(index)
        _paste_rounded(sheet, picture, left, top)
        draw.text((left, top + PICTURE_SIDE + 4), note, fill=GREY, font=_font(14))


def _paste_rounded(sheet: Image.Image, picture: Image.Image, left: int, top: int) -> None:
    if max(picture.size) > PICTURE_SIDE:
        picture = picture.copy()
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    left += (PICTURE_SIDE - picture.width) // 2
    top += (PICTURE_SIDE - picture.height) // 2
    # Pillow draws shapes without antialiasing: draw the mask larger and shrink it.
    mask = Image.new("L", (picture.width * 4, picture.height * 4), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), CORNER * 4, fill=255)
    mask = mask.resize(picture.size, Image.Resampling.LANCZOS)
    border = Image.new("RGB", picture.size, LINE)
    sheet.paste(border, (left, top), mask)
    inner = mask.resize((picture.width - 2, picture.height - 2), Image.Resampling.LANCZOS)
    sheet.paste(picture.convert("RGB").crop((1, 1, picture.width - 1, picture.height - 1)), (left + 1, top + 1), inner)


def _column_left(index: int) -> int:
    return MARGIN + CAPTION_WIDTH + GAP + index * (PICTURE_SIDE + GAP)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines that fit the width: the widest wrapping by characters whose every line does."""
    for characters in range(len(text), 4, -1):
        lines = textwrap.wrap(text, characters)
        if all(font.getlength(line) <= width for line in lines):
            return lines
    return [text]


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
