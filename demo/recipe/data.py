"""Opens the demo pack and renders it to arrays: sprites (RGBA) and avatars (RGB), 256 px. Knows no captions beyond names.

python -m stepquant.demo.recipe.data --pack PACK --out WORK
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .scenes import STYLES, Avatar, Sprite

SIZE = 256
# Both CC0; the other avatar styles of the pack need attribution.
AVATAR_STYLES = ("openPeeps", "pixelArt")
SUBJECTS_FILE = Path(__file__).parent / "subjects.json"


@dataclass
class Banks:
    """Rendered pack: `sprites` (N, 256, 256, 4) uint8 RGBA, `avatars` (M, 256, 256, 3) uint8 RGB, and their rows' meaning."""

    sprites: np.ndarray
    avatars: np.ndarray
    sprite_rows: list[Sprite]
    avatar_rows: list[Avatar]


def read_subjects() -> list[str]:
    """The subjects the demo model is taught: things a person can name at a glance."""
    return json.loads(SUBJECTS_FILE.read_text(encoding="utf-8"))


def render_pack(pack: Path, out: Path, workers: int | None = None, limit: int | None = None) -> None:
    """Render the taught subjects and avatars of a pack into `out/sprites.npy`, `avatars.npy` and `banks.json`.

    Args:
        pack: folder of the prepared pack (see README.md for how to build one).
        workers: processes, left out: one per core. limit: at most so many subjects and avatars per style, for tests.
    """
    sprite_jobs, sprite_rows = _sprite_jobs(pack, limit)
    avatar_jobs, avatar_rows = _avatar_jobs(pack, limit)
    with ProcessPoolExecutor(workers) as pool:
        jobs = [*sprite_jobs, *avatar_jobs]
        pictures = list(tqdm(pool.map(_render, jobs, chunksize=16), total=len(jobs), desc="render", mininterval=2))
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "sprites.npy", np.stack(pictures[: len(sprite_jobs)]))
    avatars = np.stack(pictures[len(sprite_jobs) :])
    if avatars[..., 3].min() < 255:
        raise ValueError(f"{pack}: an avatar is transparent; needed an opaque background. Rebuild the pack.")
    np.save(out / "avatars.npy", avatars[..., :3])
    rows = {"sprites": [vars(s) for s in sprite_rows], "avatars": [vars(a) for a in avatar_rows]}
    (out / "banks.json").write_text(json.dumps(rows), encoding="utf-8")


def read_rows(pack: Path) -> tuple[list[Sprite], list[Avatar]]:
    """What `render_pack` would draw, in the same order, without drawing it."""
    return _sprite_jobs(pack, None)[1], _avatar_jobs(pack, None)[1]


def load_banks(folder: Path) -> Banks:
    """What `render_pack` wrote; the arrays stay on disk until they are read."""
    rows = json.loads((folder / "banks.json").read_text(encoding="utf-8"))
    return Banks(
        np.load(folder / "sprites.npy", mmap_mode="r"),
        np.load(folder / "avatars.npy", mmap_mode="r"),
        [Sprite(**row) for row in rows["sprites"]],
        [Avatar(**row) for row in rows["avatars"]],
    )


def subject_name(base: str) -> str:
    """Pack name -> prompt word: lower case and plain quotes, as CLIP's tokenizer and an artist would write it."""
    return base.lower().replace("’", "'")


def _sprite_jobs(pack: Path, limit: int | None) -> tuple[list, list[Sprite]]:
    meta, vectors = _read_xz(pack / "emoji_meta.json.xz"), _read_xz(pack / "emoji_svg.json.xz")
    archive = np.load(pack / "fluent3d_256_webp.npz")
    ranges = zip(archive["hex"].tolist(), archive["offsets"][:-1], archive["offsets"][1:], strict=True)
    blob = archive["blob"]
    bitmaps = {code: blob[start:stop].tobytes() for code, start, stop in ranges}
    wanted = set(read_subjects()[:limit])
    jobs, rows = [], []
    for record in meta:
        name, style, code = subject_name(record["base"]), record["style"], record["hex"]
        if style not in STYLES or record["skin_tone"] or name not in wanted:
            continue
        jobs.append(bitmaps[code] if style == "fluent3d" else _svg_document(*vectors[style][code]))
        rows.append(Sprite(len(rows), name, style))
    return jobs, rows


def _avatar_jobs(pack: Path, limit: int | None) -> tuple[list, list[Avatar]]:
    jobs, rows = [], []
    records = _read_xz(pack / "avatars_svg.json.xz")
    for style in AVATAR_STYLES:
        for record in [r for r in records if r["style"] == style][:limit]:
            jobs.append(record["svg"])
            rows.append(Avatar(len(rows), record["caption"], record["attributes"]))
    return jobs, rows


def _svg_document(left: float, top: float, width: float, height: float, body: str) -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{SIZE}" height="{SIZE}">{body}</svg>'
    )


def _render(job: bytes | str) -> np.ndarray:
    """WebP bytes or an SVG document -> (256, 256, 4) uint8 RGBA, not premultiplied."""
    import resvg_py  # needed where pictures are made, not where banks are read

    data = job
    if isinstance(job, str):
        data = bytes(resvg_py.svg_to_bytes(svg_string=job, width=SIZE, height=SIZE, skip_system_fonts=True))
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    if picture.size != (SIZE, SIZE):
        picture = picture.resize((SIZE, SIZE), Image.LANCZOS)
    return np.asarray(picture)


def _read_xz(path: Path):
    return json.loads(lzma.decompress(path.read_bytes()))


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pack", type=Path, required=True, help="folder of the demo pack")
    parser.add_argument("--out", type=Path, required=True, help="work folder; the later steps read it")
    parser.add_argument("--limit", type=int, help="only so many subjects and avatars per style, for a dry run")
    args = parser.parse_args()
    render_pack(args.pack, args.out, limit=args.limit)


if __name__ == "__main__":
    main()
