"""A JPEG of the same prompts and seeds under several formats, one column each. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from stepquant.demo.run import to_image
from stepquant.demo.sheet import Column, Row, draw_sheet

MOST_BYTES = 1_900_000
QUALITIES = (88, 75, 60, 45)


def write_sheet(file: Path, model: str, prompts: Sequence[str], columns: Sequence[tuple[str, Tensor]]) -> None:
    """columns: (title, or title and figures on a second line; (P, 3, H, W) fp32 in [0, 1]). Files stay under 2 MB."""
    heads = [Column(*(f"{title}\n".split("\n")[:2])) for title, _ in columns]
    rows = [
        Row(prompt, [to_image(pictures[index].cpu()) for _, pictures in columns], [""] * len(columns))
        for index, prompt in enumerate(prompts)
    ]
    sheet = draw_sheet(model, "Same prompts, same seeds. dB: SQNR of the UNet's output on fp16's own trajectory.", heads, rows)
    for quality in QUALITIES:
        sheet.save(file, quality=quality)
        if file.stat().st_size <= MOST_BYTES:
            return
