"""Contact sheets: pictures in a grid with their captions under them. No sampling, no metrics."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor


def to_uint8(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8 on the CPU."""
    return ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def write_sheet(path: Path, pictures: Tensor, captions: list[str], columns: int = 8, side: int = 160) -> None:
    """Write (B, 3, H, W) pictures in [-1, 1] as one PNG, each `side` px wide, captions in three lines below."""
    rows = -(-len(captions) // columns)
    height = side + 38
    sheet = Image.new("RGB", (columns * (side + 6), rows * height), (235, 235, 235))
    draw = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(to_uint8(pictures), captions, strict=True)):
        x, y = (index % columns) * (side + 6), (index // columns) * height
        sheet.paste(Image.fromarray(np.asarray(picture)).resize((side, side), Image.LANCZOS), (x, y))
        for line, text in enumerate(textwrap.wrap(caption, max(10, side // 6))[:3]):
            draw.text((x + 1, y + side + line * 12), text, fill=(0, 0, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
