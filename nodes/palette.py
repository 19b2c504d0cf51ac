"""Colours and the font of the pictures that nodes draw. Pillow only: matplotlib is no requirement of a node."""

from __future__ import annotations

from PIL import ImageFont

PAPER = (255, 255, 255)
INK = (33, 37, 41)
MUTED = (108, 117, 125)
GRID = (226, 230, 234)
# Okabe and Ito's palette: told apart by colour-blind readers too.
SERIES = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (90, 90, 90))


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font, so that no font file is needed. It has ASCII, but no dashes, arrows or superscripts."""
    return ImageFont.load_default(size)
