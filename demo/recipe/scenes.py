"""Captions, held-out splits and layouts of the training scenes; plain Python, no pixels (compose.py draws them)."""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from functools import cache

# Prompt words of the four sprite styles, in the order of their index.
STYLES = {
    "fluent3d": "3d render",
    "noto": "cartoon drawing",
    "fluent-emoji-flat": "flat icon",
    "fluent-emoji": "glossy icon",
}
# Background word -> sRGB, in the order of their index.
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (38, 40, 43),
    "gray": (201, 205, 210),
    "red": (242, 139, 130),
    "orange": (251, 188, 116),
    "yellow": (255, 243, 160),
    "green": (183, 225, 161),
    "teal": (167, 227, 220),
    "blue": (174, 203, 250),
    "purple": (215, 174, 251),
    "pink": (253, 207, 232),
    "brown": (200, 166, 138),
}
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}
# Centres of the copies, as fractions of the picture.
COUNT_LAYOUTS = {
    2: ((0.27, 0.5), (0.73, 0.5)),
    3: ((0.5, 0.27), (0.27, 0.73), (0.73, 0.73)),
    4: ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)),
}
KIND_SHARES = {"single": 0.58, "pair": 0.14, "count": 0.16, "avatar": 0.12}

HELDOUT_STYLE_SHARE = 0.04
HELDOUT_BACKGROUND_SHARE = 0.10
HELDOUT_AVATAR_SHARE = 0.08


@dataclass(frozen=True)
class Sprite:
    """One drawn subject: row of the sprite bank, subject name (lower case, ASCII) and style key."""

    row: int
    subject: str
    style: str


@dataclass(frozen=True)
class Avatar:
    """One drawn person: row of the avatar bank, whole caption with background clause, and its attributes."""

    row: int
    caption: str
    attributes: dict[str, str | None]


@dataclass(frozen=True)
class Placement:
    """A picture put into the scene: bank row, centre and side as fractions of the scene."""

    row: int
    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Scene:
    """One training example before drawing.

    `caption` never has the background clause; `clause` is the colour word it may add. An avatar's one placement
    is a row of the avatar bank and covers the scene, so `background` is only the colour behind it.
    """

    kind: str
    caption: str
    style_phrase: str
    clause: str
    background: str
    subjects: tuple[str, ...]
    style: str
    placements: tuple[Placement, ...]


@cache
def _fraction(*parts: str) -> float:
    """A fixed pseudo-random number in [0, 1) for a tuple of words."""
    return int(hashlib.md5("|".join(parts).encode(), usedforsecurity=False).hexdigest()[:8], 16) / 2**32


def is_heldout_style(style: str, subject: str) -> bool:
    """Whether the subject is never trained in this style."""
    return _fraction("style", style, subject) < HELDOUT_STYLE_SHARE


def is_heldout_background(background: str, subject: str) -> bool:
    """Whether the subject is never trained on this background colour."""
    return _fraction("bg", background, subject) < HELDOUT_BACKGROUND_SHARE


def is_heldout_avatar(attributes: dict[str, str | None]) -> bool:
    """Whether this combination of hair, background and clothes colour is never trained."""
    hair = attributes.get("hair_color") or attributes.get("hair") or ""
    return _fraction("av", hair, attributes["background"], attributes.get("clothes_color") or "") < HELDOUT_AVATAR_SHARE


_PLURAL_RULES = (
    (r"man$", "men"),
    (r"person$", "people"),
    (r"mouse$", "mice"),
    (r"foot$", "feet"),
    (r"tooth$", "teeth"),
    (r"(s|x|ch|sh)$", r"\1es"),
    (r"([^aeiou])y$", r"\1ies"),
    (r"leaf$", "leaves"),
    (r"knife$", "knives"),
    (r"wolf$", "wolves"),
)
_ALREADY_PLURAL = re.compile(r"(?<![sui])s$")


def plural(name: str) -> str:
    """`red apple` -> `red apples`, `heart with arrow` -> `hearts with arrow`, `jeans` -> `jeans`."""
    head, separator, tail = name.partition(" with ")
    if _is_plural(head):
        return name
    for pattern, replacement in _PLURAL_RULES:
        if re.search(pattern, head):
            return re.sub(pattern, replacement, head) + separator + tail
    return head + "s" + separator + tail


def with_article(name: str) -> str:
    """`red apple` -> `a red apple`, `owl` -> `an owl`, `jeans` -> `jeans`."""
    if _is_plural(name.partition(" with ")[0]):
        return name
    return ("an " if name[0] in "aeiou" else "a ") + name


def _is_plural(head: str) -> bool:
    return bool(_ALREADY_PLURAL.search(head)) and not head.endswith(("glass", "cactus", "bus"))


class SceneSampler:
    """Draws scenes at random, from the trained combinations or from anything.

    Args:
        sprites, avatars: what may be shown; avatars may be empty, their share then goes to singles.
        train: True leaves out every held-out combination.
    """

    def __init__(self, sprites: list[Sprite], avatars: list[Avatar], train: bool = True):
        allowed = [s for s in sprites if not (train and is_heldout_style(s.style, s.subject))]
        self._by_style = {style: [s for s in allowed if s.style == style] for style in STYLES}
        self._by_style = {style: found for style, found in self._by_style.items() if found}
        self._avatars = [a for a in avatars if not (train and is_heldout_avatar(a.attributes))]
        self._train = train

    def draw(self, rng: random.Random, kind: str | None = None) -> Scene:
        """One scene; `kind` is single, pair, count or avatar, left out: drawn by KIND_SHARES."""
        kind = kind or rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]
        if kind == "avatar" and self._avatars:
            return avatar_scene(rng.choice(self._avatars))
        style = rng.choice(list(self._by_style))
        sprite = rng.choice(self._by_style[style])
        if kind != "pair":
            background = self._background(rng, sprite.subject)
            return count_scene(rng, sprite, background) if kind == "count" else single_scene(rng, sprite, background)
        other = rng.choice(self._by_style[style])
        while other.subject == sprite.subject:
            other = rng.choice(self._by_style[style])
        return pair_scene(rng, sprite, other, self._background(rng, sprite.subject, other.subject))

    def _background(self, rng: random.Random, *subjects: str) -> str:
        while True:
            word = rng.choice(list(BACKGROUNDS)) if rng.random() < 0.75 else "white"
            if not (self._train and any(is_heldout_background(word, subject) for subject in subjects)):
                return word


def single_scene(rng: random.Random, sprite: Sprite, background: str) -> Scene:
    """`3d render of a red apple`, near the middle at 66 to 92 % of the picture's side."""
    x, y = 0.5 + rng.uniform(-0.05, 0.05), 0.5 + rng.uniform(-0.05, 0.05)
    placement = Placement(sprite.row, x, y, rng.uniform(0.66, 0.92))
    return _sprite_scene("single", with_article(sprite.subject), background, (sprite,), (placement,))


def count_scene(rng: random.Random, sprite: Sprite, background: str, count: int | None = None) -> Scene:
    """`flat icon of three owls`: two, three or four copies in a fixed layout."""
    count = count or rng.choice(list(COUNT_LAYOUTS))
    placements = tuple(Placement(sprite.row, x, y, 0.45) for x, y in COUNT_LAYOUTS[count])
    return _sprite_scene("count", f"{NUMBER_WORDS[count]} {plural(sprite.subject)}", background, (sprite,), placements)


def pair_scene(rng: random.Random, sprite: Sprite, other: Sprite, background: str) -> Scene:
    """`cartoon drawing of a cat next to a rose`; `above` stacks them, the other words put them side by side."""
    first, second = with_article(sprite.subject), with_article(other.subject)
    if rng.random() < 0.3:
        words, spots = f"{first} above {second}", ((0.5, 0.27), (0.5, 0.73))
    else:
        relation = rng.choice(("next to", "and", "to the left of"))
        words = f"{first} {relation} {second}"
        spots = tuple((x, 0.5 + rng.uniform(-0.04, 0.04)) for x in (0.27, 0.73))
    placements = tuple(Placement(s.row, x, y, 0.46) for s, (x, y) in zip((sprite, other), spots, strict=True))
    return _sprite_scene("pair", words, background, (sprite, other), placements)


def avatar_scene(avatar: Avatar) -> Scene:
    """A whole avatar picture; its own caption says the background."""
    caption = avatar.caption.rpartition(", ")[0]
    background = avatar.attributes["background"]
    phrase = caption.partition(" of ")[0]
    placement = Placement(avatar.row, 0.5, 0.5, 1.0)
    return Scene("avatar", caption, phrase, background, background, (), phrase, (placement,))


def _sprite_scene(kind: str, words: str, background: str, sprites: tuple[Sprite, ...], placements: tuple[Placement, ...]) -> Scene:
    phrase = STYLES[sprites[0].style]
    subjects = tuple(sprite.subject for sprite in sprites)
    caption = f"{phrase} of {words}"
    return Scene(kind, caption, phrase, background, background, subjects, sprites[0].style, placements)


def full_caption(scene: Scene) -> str:
    """The caption with its background clause, as evaluation prompts are written."""
    return f"{scene.caption}, {scene.clause} background"


def training_caption(rng: random.Random, scene: Scene) -> str:
    """The caption with clauses left out at random, so that short prompts work too.

    Background: absent in 15 % (white: in 60 %, being what one expects unsaid); style words: absent in 10 %.
    """
    text = scene.caption
    if rng.random() < 0.10:
        text = text.partition(" of ")[2]
    if rng.random() >= (0.60 if scene.clause == "white" else 0.15):
        text += f", {scene.clause} background"
    return text
