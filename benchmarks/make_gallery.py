"""Writes data/gallery.safetensors, what quality_judge.py compares pictures with: Lite0 features of the demo pack's real sprites.

    python benchmarks/make_gallery.py --work WORK     (WORK: the banks that stepquant.demo.recipe.data renders from the pack)

Features of every subject on white, and the mean move of the features from white to each other background.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from quality_judge import GALLERY_FILE
from safetensors.torch import save_file
from torch import Tensor

from stepquant.demo.recipe.compose import Composer
from stepquant.demo.recipe.data import load_banks
from stepquant.demo.recipe.evaluate import Gallery
from stepquant.demo.recipe.judge import Lite0
from stepquant.demo.recipe.scenes import BACKGROUNDS, single_scene

SHIFT_SPRITES = 32


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--centroids", type=Path, help="tensor file of the centroids on white, if they are known")
    args = parser.parse_args()
    banks = load_banks(args.work)
    composer, lite0 = Composer(banks, "cpu"), Lite0("cpu")
    if args.centroids:
        centroids = torch.load(args.centroids, weights_only=True)[0]
    else:
        centroids = Gallery(banks, composer, lite0, torch.device("cpu"), ["white"])._centroids[0]
    scale = centroids.abs().amax(1) / 127
    subjects = sorted({sprite.subject for sprite in banks.sprite_rows})
    tensors = {
        "codes": (centroids / scale[:, None]).round().to(torch.int8),
        "scale": scale,
        "shift": _shifts(banks, composer, lite0).half(),
        "subjects": torch.tensor(list("\n".join(subjects).encode("utf-8")), dtype=torch.uint8),
    }
    GALLERY_FILE.parent.mkdir(exist_ok=True)
    save_file(tensors, GALLERY_FILE)


def _shifts(banks, composer: Composer, lite0: Lite0) -> Tensor:
    """(backgrounds, 1280): mean over some sprites of feature on the background - feature on white."""
    sprites = random.Random(0).sample(banks.sprite_rows, SHIFT_SPRITES)
    means = []
    for word in BACKGROUNDS:
        rng = random.Random(1)  # the same places on every background
        means.append(lite0.features(composer.draw([single_scene(rng, sprite, word) for sprite in sprites]), batch=16).mean(0))
    return torch.stack(means) - means[list(BACKGROUNDS).index("white")]


if __name__ == "__main__":
    main()
