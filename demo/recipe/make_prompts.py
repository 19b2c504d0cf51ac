"""Writes `demo/prompts.json`: prompts of trained and of held-out combinations, so that users of them need no pack.

python -m stepquant.demo.recipe.make_prompts --pack PACK
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from ..prompts import PROMPTS_FILE
from .data import read_rows
from .scenes import (
    BACKGROUNDS,
    Avatar,
    Scene,
    SceneSampler,
    Sprite,
    full_caption,
    is_heldout_background,
    is_heldout_style,
    single_scene,
)

COUNT = 512
# One cycle: of eight prompts five are single things.
_KINDS = ("single", "single", "pair", "single", "count", "single", "avatar", "single")


def seen_scenes(sprites: list[Sprite], avatars: list[Avatar]) -> list[Scene]:
    """COUNT different scenes of trained combinations, in a fixed mix of kinds."""
    sampler, rng = SceneSampler(sprites, avatars), random.Random("seen prompts")
    return _different(lambda index: sampler.draw(rng, _KINDS[index % len(_KINDS)]))


def heldout_scenes(sprites: list[Sprite]) -> list[Scene]:
    """COUNT different single things, alternating between a style and a background never trained with that thing."""
    rng = random.Random("heldout prompts")
    by_style = [s for s in sprites if is_heldout_style(s.style, s.subject)]
    others = [s for s in sprites if not is_heldout_style(s.style, s.subject)]

    def draw(index: int) -> Scene:
        while True:
            sprite = rng.choice(by_style if index % 2 else others)
            word = rng.choice(list(BACKGROUNDS))
            if is_heldout_background(word, sprite.subject) != bool(index % 2):
                return single_scene(rng, sprite, word)

    return _different(draw)


def _different(draw) -> list[Scene]:
    scenes: dict[str, Scene] = {}
    while len(scenes) < COUNT:
        scene = draw(len(scenes))
        scenes.setdefault(full_caption(scene), scene)
    return list(scenes.values())


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pack", type=Path, required=True, help="folder of the demo pack")
    sprites, avatars = read_rows(parser.parse_args().pack)
    lists = {"seen": seen_scenes(sprites, avatars), "heldout": heldout_scenes(sprites)}
    captions = {name: [full_caption(scene) for scene in scenes] for name, scenes in lists.items()}
    PROMPTS_FILE.write_text(json.dumps(captions, indent=0, ensure_ascii=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
