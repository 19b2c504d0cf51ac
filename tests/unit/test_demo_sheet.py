"""The picture sheet: every picture where it belongs, captions inside their column."""

import pytest
from PIL import Image, ImageFont

from stepquant.demo.sheet import CAPTION_WIDTH, PICTURE_SIDE, Column, Row, draw_sheet, wrap

COLOURS = [["red", "green", "blue"], ["cyan", "magenta", "yellow"]]


def sheet_of(side, caption="a caption"):
    rows = [Row(caption, [Image.new("RGB", (side, side), colour) for colour in row], ["", "note", "note"]) for row in COLOURS]
    return draw_sheet("Title", "Subtitle", [Column(name, "figures") for name in "abc"], rows, ["small print"])


@pytest.mark.parametrize("side", [64, 256, 1024], ids=["smaller", "native", "larger"])
def test_sheet_shows_rows_and_columns_in_order(side):
    sheet = sheet_of(side)
    wanted = [[Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in row] for row in COLOURS]
    places = {
        colour: [(x, y) for y in range(0, sheet.height, 8) for x in range(0, sheet.width, 8) if sheet.getpixel((x, y)) == colour]
        for row in wanted
        for colour in row
    }
    assert all(places.values())
    left = [[min(x for x, _ in places[colour]) for colour in row] for row in wanted]
    top = [[min(y for _, y in places[colour]) for colour in row] for row in wanted]
    assert left[0] == left[1] == sorted(set(left[0]))
    assert len(set(top[0])) == len(set(top[1])) == 1 and top[0][0] + min(side, PICTURE_SIDE) < top[1][0] + 8


def test_sheet_wraps_long_captions_inside_their_column():
    font = ImageFont.load_default(19)
    lines = wrap("cartoon drawing of a very long caption with a great many words on a purple background", font, CAPTION_WIDTH)
    assert len(lines) > 2 and all(font.getlength(line) <= CAPTION_WIDTH for line in lines)


def test_sheet_grows_with_its_rows_only_in_height():
    columns = [Column("a", "")]
    sizes = [draw_sheet("t", "s", columns, [Row("c", [Image.new("RGB", (256, 256))], [""])] * count).size for count in (1, 3)]
    assert sizes[0][0] == sizes[1][0] and sizes[1][1] > sizes[0][1] + 2 * PICTURE_SIDE
