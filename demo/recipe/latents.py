"""Encodes many random training scenes once, so that the UNet's training never runs the VAE. No training here.

    torchrun --nproc-per-node N -m stepquant.demo.recipe.latents --work WORK --seconds 60
Every process writes its own `pool_<rank>.safetensors`.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..architecture import build_vae
from ..ldm_state import vae_from_ldm
from ..pipeline import load_module_state
from .captions import CaptionVocabulary
from .compose import Composer
from .data import SIZE, load_banks
from .scenes import SceneSampler, training_caption
from .workers import Workers, start_workers, stop_workers

# Share of scenes that show a window of an enlarged picture, said so in SDXL's size conditioning.
ZOOM_SHARE = 0.10


@dataclass
class LatentPool:
    """Encoded scenes on the training device.

    `latents` (N, 4, 32, 32) fp16 of unit variance, `rows` (N, 77) int16 caption rows, `sizes` (N, 6) fp32 SDXL time ids:
    original height and width, crop top and left, target height and width, in pixels.
    """

    latents: Tensor
    rows: Tensor
    sizes: Tensor

    def save(self, work: Path, rank: int) -> None:
        """Write this process's part; the file appears whole."""
        fresh = work / f"pool_{rank}.new"
        save_file({name: value.cpu().contiguous() for name, value in vars(self).items()}, fresh)
        fresh.replace(pool_path(work, rank))

    @classmethod
    def load(cls, work: Path, rank: int, device: torch.device) -> LatentPool:
        """Read this process's part onto its device."""
        return cls(**load_file(pool_path(work, rank), device=str(device)))


def pool_path(work: Path, rank: int) -> Path:
    """Where the process of this rank keeps its encoded scenes."""
    return work / f"pool_{rank}.safetensors"


@torch.no_grad()
def build_pool(
    vae: torch.nn.Module,
    composer: Composer,
    sampler: SceneSampler,
    vocabulary: CaptionVocabulary,
    workers: Workers,
    count: int,
    seconds: float,
    batch: int = 256,
) -> LatentPool:
    """Encode up to `count` scenes, fewer if `seconds` run out; every process draws its own."""
    rng, began = random.Random(5000 + workers.rank), time.monotonic()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    progress = tqdm(total=count, disable=not workers.is_main, desc="encode", unit="scene", mininterval=10)
    while progress.n < count and time.monotonic() - began < seconds:
        scenes = [sampler.draw(rng) for _ in range(min(batch, count - progress.n))]
        zooms, sizes = _draw_zooms(rng, len(scenes))
        rows = vocabulary.rows([training_caption(rng, scene) for scene in scenes])
        pictures = composer.draw(scenes, zooms).contiguous(memory_format=torch.channels_last)
        with torch.autocast(workers.device.type, torch.bfloat16, enabled=workers.device.type == "cuda"):
            latents = vae.encoder(pictures)
        parts.append((latents.half(), rows.to(workers.device), sizes.to(workers.device)))
        if workers.device.type == "cuda" and len(parts) % 8 == 0:
            torch.cuda.synchronize()  # else the clock above would measure how fast Python queues work
        progress.n += len(scenes)
        progress.update(0)
    progress.close()
    return LatentPool(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _draw_zooms(rng: random.Random, count: int) -> tuple[Tensor, Tensor]:
    """Zoom (count, 3) for the composer and SDXL's time ids (count, 6)."""
    zooms, sizes = [], []
    for _ in range(count):
        zoom = rng.uniform(1.05, 1.4) if rng.random() < ZOOM_SHARE else 1.0
        left, top = (rng.uniform(0, 1 - 1 / zoom) for _ in range(2))
        zooms.append((zoom, left, top))
        side = round(SIZE * zoom)
        sizes.append((side, side, round(top * side), round(left * side), SIZE, SIZE))
    return torch.tensor(zooms), torch.tensor(sizes, dtype=torch.float32)


def load_trained_vae(work: Path, device: torch.device) -> torch.nn.Module:
    """The autoencoder that train_vae wrote, fp32, frozen."""
    vae = build_vae()
    load_module_state(vae, vae_from_ldm(load_file(work / "vae.safetensors")))
    return vae.to(device).eval().requires_grad_(False)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with the rendered banks and vae.safetensors")
    parser.add_argument("--seconds", type=float, default=60, help="time for encoding, at most")
    parser.add_argument("--count", type=int, default=240_000, help="scenes a process, at most")
    args = parser.parse_args()
    workers = start_workers()
    banks = load_banks(args.work)
    sampler = SceneSampler(banks.sprite_rows, banks.avatar_rows)
    vae, composer = load_trained_vae(args.work, workers.device), Composer(banks, workers.device)
    pool = build_pool(vae, composer, sampler, CaptionVocabulary(banks), workers, args.count, args.seconds)
    pool.save(args.work, workers.rank)
    stop_workers()


if __name__ == "__main__":
    main()
