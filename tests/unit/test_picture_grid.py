"""The sheet of pictures that Compare draws with Pillow."""

import pytest
from PIL import Image

from stepquant.nodes.picture_grid import Row, draw_picture_grid


def flat(size, colour):
    return Image.new("RGB", size, colour)


def test_grid_shows_every_picture_in_its_place():
    rows = [Row("seed 1", [flat((200, 200), "red"), flat((200, 200), "lime")]), Row("seed 2", [flat((200, 200), "blue")] * 2)]
    sheet = draw_picture_grid(["original", "quantized"], rows, ["a line of figures"])
    assert sheet.getpixel((120, 160)) == (255, 0, 0)
    assert sheet.getpixel((330, 160)) == (0, 255, 0)
    assert sheet.getpixel((120, 400)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("size", "cell_width"), [((1024, 768), 512), ((64, 64), 192), ((300, 300), 300)], ids=["shrunk", "enlarged", "as is"]
)
def test_grid_scales_pictures_to_a_readable_size(size, cell_width):
    sheet = draw_picture_grid(["x"], [Row("", [flat(size, "red")])])
    row = [sheet.getpixel((x, 120)) for x in range(sheet.width)]
    assert row.count((255, 0, 0)) == cell_width


def test_grid_is_wide_enough_for_its_longest_line():
    line = "a line of figures that is much longer than one small picture is wide, so that it would be cut"
    short, long = (draw_picture_grid(["x"], [Row("", [flat((64, 64), "red")])], [text]) for text in ("a", line))
    assert long.width > short.width
