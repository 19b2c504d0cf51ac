"""A subject that the demo model has never seen, drawn here, and how far pictures are from it by the judge's features. Trains nothing."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from stepquant.demo.recipe.judge import Lite0, background_words
from stepquant.demo.recipe.scenes import BACKGROUNDS

SIDE = 256
OVERSAMPLING = 4
# "zorp" is no word of the captions; "alien" is one of the 645 subjects, and looks otherwise.
PROMPT = "flat icon of a zorp alien, {} background"
TRAINED = ("white", "blue", "yellow", "pink", "green")  # one picture on each
HELD_OUT = ("teal", "orange", "gray", "red", "purple")
HELD_OUT_PICTURES = 4  # real ones on each held-out background
HORN, BODY, FEET = (242, 120, 40), (24, 150, 160), (16, 110, 120)
WHITE, PUPIL, STRIPE = (255, 255, 255), (60, 30, 110), (255, 214, 64)


@dataclass(frozen=True)
class Pictures:
    """trained: (5, 3, 256, 256) in [0, 1], one for each prompt; held_out: (P, 3, 256, 256), backgrounds: of each of these."""

    trained: Tensor
    prompts: tuple[str, ...]
    held_out: Tensor
    backgrounds: tuple[str, ...]


def draw_pictures(seed: int = 1) -> Pictures:
    """Placed as the demo model's training scenes place a single thing."""
    rng = random.Random(seed)
    trained = [_scene(word, rng) for word in TRAINED]
    backgrounds = tuple(word for word in HELD_OUT for _ in range(HELD_OUT_PICTURES))
    held_out = [_scene(word, rng) for word in backgrounds]
    return Pictures(torch.stack(trained), tuple(PROMPT.format(word) for word in TRAINED), torch.stack(held_out), backgrounds)


class SubjectJudge:
    """Distance 1 - cosine of EfficientNet-Lite0 features, mean over all pairs of a picture and a held-out real one."""

    def __init__(self, pictures: Pictures, device: str | torch.device) -> None:
        self._lite0 = Lite0(device)
        self._real = self._features(pictures.held_out)

    def distance(self, pictures: Tensor) -> float:
        """pictures: (P, 3, H, W) in [0, 1]."""
        return float((1 - self._features(pictures) @ self._real.t()).mean())

    def floor(self) -> float:
        """Of the real pictures among themselves."""
        pairs = 1 - self._real @ self._real.t()
        return float(pairs.sum() / (pairs.numel() - len(pairs)))

    def _features(self, pictures: Tensor) -> Tensor:
        return self._lite0.features(pictures * 2 - 1)


def right_backgrounds(pictures: Tensor, words: list[str]) -> float:
    """Share in percent of the pictures whose border has the asked colour."""
    found = background_words(pictures * 2 - 1)
    return 100 * sum(a == b for a, b in zip(found, words, strict=True)) / len(words)


def _scene(background: str, rng: random.Random) -> Tensor:
    side = SIDE * OVERSAMPLING
    share, x, y = rng.uniform(0.66, 0.92), 0.5 + rng.uniform(-0.05, 0.05), 0.5 + rng.uniform(-0.05, 0.05)
    size = round(share * side)
    sprite = _sprite().resize((size, size), Image.LANCZOS)
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[background])
    canvas.paste(sprite, (round(x * side - size / 2), round(y * side - size / 2)), sprite)
    pixels = np.asarray(canvas.resize((SIDE, SIDE), Image.LANCZOS), dtype=np.float32)
    return torch.from_numpy(pixels / 255).permute(2, 0, 1)


def _sprite() -> Image.Image:
    """One-eyed, horned, striped; transparent around."""
    sprite = Image.new("RGBA", (1024, 1024), (0, 0, 0, 0))
    draw = ImageDraw.Draw(sprite)
    draw.polygon([(250, 330), (170, 60), (400, 240)], fill=HORN)
    draw.polygon([(774, 330), (854, 60), (624, 240)], fill=HORN)
    draw.rounded_rectangle((190, 190, 834, 860), 300, fill=BODY)
    draw.rounded_rectangle((300, 800, 450, 970), 60, fill=FEET)
    draw.rounded_rectangle((574, 800, 724, 970), 60, fill=FEET)
    draw.ellipse((352, 270, 672, 590), fill=WHITE)
    draw.ellipse((442, 360, 582, 500), fill=PUPIL)
    draw.ellipse((470, 380, 520, 430), fill=WHITE)
    draw.rounded_rectangle((330, 640, 694, 690), 25, fill=STRIPE)
    draw.rounded_rectangle((360, 730, 664, 780), 25, fill=STRIPE)
    return sprite
