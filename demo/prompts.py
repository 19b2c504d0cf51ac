"""Prompts the demo model was trained for: those of the demo command, others to calibrate on, and two long lists to measure with."""

from __future__ import annotations

import json
from pathlib import Path

# Written by recipe/make_prompts.py: 512 prompts of each kind, in a fixed order.
PROMPTS_FILE = Path(__file__).parent / "prompts.json"

# Each asks for something else: shading, flat shapes, a portrait, outline, counting, layout.
SHOWN = (
    "3d render of a rocket, blue background",
    "flat icon of a panda, green background",
    "sketch avatar of a person with bangs, light skin, sunglasses, a full beard, green shirt, purple background",
    "cartoon drawing of a lobster, teal background",
    "glossy icon of three lemons, blue background",
    "flat icon of a bear, orange background",
    "flat icon of a cat face, teal background",
    "3d render of a red apple next to a teapot, white background",
)

# No subject of these is shown: the static scales must hold for pictures they were not made from.
CALIBRATION = (
    "3d render of a tiger, green background",
    "cartoon drawing of two mushrooms, pink background",
    "flat icon of a guitar",
    "glossy icon of a turtle next to an umbrella, blue background",
    "3d render of a castle, red background",
    "cartoon drawing of a robot, gray background",
    "flat icon of four bananas, teal background",
    "glossy icon of a butterfly, black background",
)


def seen_prompts(count: int) -> list[str]:
    """The first `count` (at most 512) prompts of trained combinations: single things, pairs, counts and avatars mixed."""
    return _read("seen", count)


def heldout_prompts(count: int) -> list[str]:
    """The first `count` (at most 512) single things in a style or on a background they were never trained with."""
    return _read("heldout", count)


def _read(name: str, count: int) -> list[str]:
    prompts = json.loads(PROMPTS_FILE.read_text(encoding="utf-8"))[name]
    if not 0 <= count <= len(prompts):
        raise ValueError(f"{name} prompts: {count} asked; needed 0 to {len(prompts)}. Ask for fewer.")
    return prompts[:count]
