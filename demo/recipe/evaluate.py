"""Measures the trained model: subject retrieval, background and count, each between a ceiling and a floor.

python -m stepquant.demo.recipe.evaluate --work WORK [--model FOLDER] [--images 640] --out REPORT_FOLDER
"""

from __future__ import annotations

import argparse
import json
import random
import time
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..architecture import MODEL_DIR
from ..pipeline import load_demo_pipeline
from .compose import Composer
from .data import Banks, load_banks
from .judge import Lite0, background_words, object_counts, subject_ranks
from .pictures import write_sheet
from .scenes import (
    BACKGROUNDS,
    NUMBER_WORDS,
    Scene,
    SceneSampler,
    full_caption,
    is_heldout_background,
    is_heldout_style,
    single_scene,
)

SETS = ("seen", "heldout_style", "heldout_background", "counts", "avatars")


class Gallery:
    """Mean Lite0 feature of every subject on each given background, over the real sprites of all styles."""

    def __init__(self, banks: Banks, composer: Composer, lite0: Lite0, device: torch.device, words: list[str]):
        self._words = words
        self.subjects = sorted({sprite.subject for sprite in banks.sprite_rows})
        position = {subject: index for index, subject in enumerate(self.subjects)}
        centroids = []
        for word in tqdm(words, desc="gallery"):
            sums = torch.zeros(len(self.subjects), 1280, device=device)
            for start in range(0, len(banks.sprite_rows), 256):
                sprites = banks.sprite_rows[start : start + 256]
                rng = random.Random(start)
                pictures = composer.draw([single_scene(rng, sprite, word) for sprite in sprites])
                rows = torch.tensor([position[sprite.subject] for sprite in sprites], device=device)
                sums.index_add_(0, rows, lite0.features(pictures))
            centroids.append(torch.nn.functional.normalize(sums, dim=1))
        self._centroids = torch.stack(centroids)  # (words, S, 1280)

    def ranks(self, features: Tensor, scenes: list[Scene]) -> Tensor:
        """Rank (B,) of each scene's first subject among all subjects on the same background."""
        background = torch.tensor([self._words.index(scene.background) for scene in scenes], device=features.device)
        subject = torch.tensor([self.subjects.index(scene.subjects[0]) for scene in scenes], device=features.device)
        parts = [
            subject_ranks(features[i : i + 64], self._centroids[background[i : i + 64]], subject[i : i + 64])
            for i in range(0, len(features), 64)
        ]
        return torch.cat(parts)


def evaluation_scenes(banks: Banks, name: str, count: int, words: list[str]) -> list[Scene]:
    """`count` scenes of one of SETS on the given backgrounds, drawn with a fixed seed; every prompt says its background."""
    rng = random.Random(f"evaluate {name}")
    sampler = SceneSampler(banks.sprite_rows, banks.avatar_rows)
    if name in ("counts", "avatars"):
        scenes = (sampler.draw(rng, name[:-1]) for _ in range(1000 * count))
        return list(islice((scene for scene in scenes if scene.background in words), count))
    if name == "heldout_style":
        sprites = [s for s in banks.sprite_rows if is_heldout_style(s.style, s.subject)]
    else:
        sprites = [s for s in banks.sprite_rows if not is_heldout_style(s.style, s.subject)]
    scenes = []
    while len(scenes) < count:
        sprite, background = rng.choice(sprites), rng.choice(words)
        if is_heldout_background(background, sprite.subject) == (name == "heldout_background"):
            scenes.append(single_scene(rng, sprite, background))
    return scenes


@torch.no_grad()
def generate(pipeline, scenes: list[Scene], steps: int, guidance: float, seed: int, batch: int) -> Tensor:
    """Pictures (B, 3, 256, 256) fp32 in [-1, 1] on the CPU, picture i from seed + i."""
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in tqdm(range(0, len(scenes), batch), desc="generate"):
        prompts = [full_caption(scene) for scene in scenes[start : start + batch]]
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(prompts))]
        out = pipeline(
            prompts,
            negative_prompt=[""] * len(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="pt",
        )
        parts.append(out.images.float().cpu() * 2 - 1)
    return torch.cat(parts)


def judge(pictures: Tensor, scenes: list[Scene], gallery: Gallery, lite0: Lite0, name: str) -> dict[str, float]:
    """The figures that make sense for a set: shares in [0, 1]."""
    right = [word == scene.background for word, scene in zip(background_words(pictures), scenes, strict=True)]
    figures = {"background": sum(right) / len(right)}
    if name == "counts":
        asked = [len(scene.placements) for scene in scenes]
        found = object_counts(pictures)
        figures["count"] = sum(a == f for a, f in zip(asked, found, strict=True)) / len(asked)
        for number, word in NUMBER_WORDS.items():
            hits = [f == number for a, f in zip(asked, found, strict=True) if a == number]
            figures[f"count_{word}"] = sum(hits) / max(1, len(hits))
    elif name != "avatars":
        ranks = gallery.ranks(lite0.features(pictures), scenes)
        figures["subject_r1"] = (ranks < 1).float().mean().item()
        figures["subject_r5"] = (ranks < 5).float().mean().item()
    return figures


def evaluate(args: argparse.Namespace) -> dict:
    """Generate and judge every set; writes `report.json` and sheets to `args.out`, returns the report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    banks = load_banks(args.work)
    composer, lite0 = Composer(banks, device), Lite0(device)
    words = args.backgrounds or list(BACKGROUNDS)
    gallery = Gallery(banks, composer, lite0, device, words)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipeline = load_demo_pipeline(dtype, device, args.model)
    report = {"images_per_set": args.images, "steps": args.steps, "guidance": args.guidance, "sets": {}}
    report.update(subjects=len(gallery.subjects), backgrounds=words)
    for name in SETS:
        scenes, began = evaluation_scenes(banks, name, args.images, words), time.monotonic()
        generated = generate(pipeline, scenes, args.steps, args.guidance, 0, args.batch)
        seconds = time.monotonic() - began
        real = torch.cat([composer.draw(scenes[i : i + 64]).cpu() for i in range(0, len(scenes), 64)])
        shift = len(scenes) // 2 + 1
        shuffled = torch.cat([generated[shift:], generated[:shift]])
        report["sets"][name] = {
            "generated": judge(generated, scenes, gallery, lite0, name),
            "real": judge(real, scenes, gallery, lite0, name),
            "shuffled": judge(shuffled, scenes, gallery, lite0, name),
            "seconds": round(seconds, 1),
        }
        args.out.mkdir(parents=True, exist_ok=True)
        write_sheet(args.out / f"eval_{name}.png", generated[:48], [full_caption(scene) for scene in scenes[:48]])
        (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with the rendered banks")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="folder of the weights, default the shipped ones")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.json and the sheets")
    parser.add_argument("--images", type=int, default=640, help="pictures in each of the five sets")
    parser.add_argument("--backgrounds", nargs="+", choices=list(BACKGROUNDS), help="only these, for a short run; default all")
    parser.add_argument("--steps", type=int, default=20, help="sampler steps")
    parser.add_argument("--guidance", type=float, default=5.0, help="classifier-free guidance scale")
    parser.add_argument("--batch", type=int, default=64, help="pictures generated together")
    print(json.dumps(evaluate(parser.parse_args()), indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
