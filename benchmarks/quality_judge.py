"""Prompt adherence of the demo model's pictures, by judges that know nothing of the model: background, subject, count.

A picture adheres if everything that can be checked of its prompt is right: the background colour always, the subject of single
things (nearest of 645 by EfficientNet-Lite0 features), the number of counted things.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from stepquant.demo.recipe.judge import Lite0, background_words, object_counts
from stepquant.demo.recipe.scenes import BACKGROUNDS, NUMBER_WORDS, plural, with_article

GALLERY_FILE = Path(__file__).parent / "data" / "gallery.safetensors"
CONFIDENCE_95 = 1.96
_BACKGROUND = re.compile(r", (\w+) background$")


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for, as far as it can be checked; None: it says nothing of it."""

    background: str | None
    subject: int | None
    count: int | None


class Judge:
    """Lite0 and the mean features of real sprites: by subject on white, and how every other background moves them."""

    def __init__(self, device: str | torch.device, gallery: Path = GALLERY_FILE) -> None:
        stored = load_file(gallery)
        self._centroids = (stored["codes"].float() * stored["scale"][:, None]).to(device)  # (S, 1280)
        self._shift = stored["shift"].float().to(device)  # (backgrounds, 1280)
        names = bytes(stored["subjects"].tolist()).decode("utf-8").split("\n")
        self._single = {with_article(name): index for index, name in enumerate(names)}
        self._counted = {plural(name): index for index, name in enumerate(names)}
        self._lite0 = Lite0(device)

    def asked(self, prompt: str) -> Asked:
        """What one prompt of demo/prompts.json asks for."""
        found = _BACKGROUND.search(prompt)
        words = _BACKGROUND.sub("", prompt).partition(" of ")[2]
        number, _, counted = words.partition(" ")
        count = next((value for value, word in NUMBER_WORDS.items() if word == number and counted in self._counted), None)
        return Asked(found and found.group(1), self._single.get(words), count)

    @torch.no_grad()
    def adheres(self, pictures: Tensor, prompts: Sequence[str], batch: int = 256) -> Tensor:
        """(P,) bool. pictures: (P, 3, H, W) fp32 in [0, 1]."""
        pictures = pictures * 2 - 1
        asked = [self.asked(prompt) for prompt in prompts]
        right = [want.background in (None, found) for want, found in zip(asked, background_words(pictures), strict=True)]
        counted = [index for index, want in enumerate(asked) if want.count is not None]
        if counted:
            for index, found in zip(counted, object_counts(pictures[counted]), strict=True):
                right[index] &= found == asked[index].count
        single = [index for index, want in enumerate(asked) if want.subject is not None]
        if single:
            nearest = self._nearest(pictures[single], [asked[index].background for index in single], batch)
            for index, found in zip(single, nearest, strict=True):
                right[index] &= found == asked[index].subject
        return torch.tensor(right)

    def _nearest(self, pictures: Tensor, backgrounds: Sequence[str | None], batch: int) -> list[int]:
        features = self._lite0.features(pictures, batch)
        words = list(BACKGROUNDS)
        found = []
        for feature, background in zip(features, backgrounds, strict=True):
            centroids = torch.nn.functional.normalize(self._centroids + self._shift[words.index(background or "white")], dim=1)
            found.append(int((centroids @ feature).argmax()))
        return found


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences in percentage points and its 95 % interval; count: pairs."""

    mean: float
    low: float
    high: float
    count: int


def paired_difference(reference: Tensor, test: Tensor) -> Difference:
    """test - reference of the same prompts and seeds; (P,) bool each. The interval is the normal one of a paired mean."""
    change = 100 * (test.double() - reference.double())
    half = CONFIDENCE_95 * float(change.std()) / math.sqrt(len(change)) if len(change) > 1 else math.inf
    return Difference(float(change.mean()), float(change.mean()) - half, float(change.mean()) + half, len(change))
