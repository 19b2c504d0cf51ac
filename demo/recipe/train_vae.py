"""Trains the autoencoder (TAESD's architecture) on scene crops within a time budget; the latents end at unit variance.

torchrun --nproc-per-node N -m stepquant.demo.recipe.train_vae --work WORK --seconds 170
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..architecture import build_vae
from ..ldm_state import vae_to_ldm
from .compose import Composer
from .data import load_banks
from .pictures import write_sheet
from .scenes import SceneSampler
from .workers import Schedule, Workers, start_workers, stop_workers

PEAK_RATE = 1e-3
CROP = 128
# Largest noise added to latents, so that the decoder bears what a sampler makes.
LATENT_NOISE = 0.08
# After this share of the time the encoder is normalised and frozen; the decoder goes on.
FREEZE_AT = 0.75


def multiscale_ssim_loss(x: Tensor, y: Tensor, scales: int = 3) -> Tensor:
    """1 - SSIM with a 7 px box window, averaged over `scales` halvings; x, y (B, 3, H, W) in [-1, 1]."""
    loss = x.new_zeros(())
    for _ in range(scales):
        mean_x, mean_y = F.avg_pool2d(x, 7, 1), F.avg_pool2d(y, 7, 1)
        var_x = F.avg_pool2d(x * x, 7, 1) - mean_x**2
        var_y = F.avg_pool2d(y * y, 7, 1) - mean_y**2
        covariance = F.avg_pool2d(x * y, 7, 1) - mean_x * mean_y
        # SSIM's constants for a range of 2: (0.01 * 2)^2 and (0.03 * 2)^2.
        luminance = (2 * mean_x * mean_y + 4e-4) / (mean_x**2 + mean_y**2 + 4e-4)
        structure = (2 * covariance + 3.6e-3) / (var_x + var_y + 3.6e-3)
        loss = loss + (1 - (luminance * structure).mean()) / scales
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return loss


def reconstruction_loss(restored: Tensor, target: Tensor) -> Tensor:
    """L1, L1 of the differences between neighbours, L1 of 8 px means, and multi-scale SSIM; (B, 3, H, W) in [-1, 1].

    The means hold the colour of whole latent cells: without them a rare hue is given up for sharper edges.
    """
    error = restored - target
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    colour = F.avg_pool2d(error, 8).abs().mean()
    return error.abs().mean() + gradient + colour + 0.4 * multiscale_ssim_loss(restored, target)


def whitening_loss(latents: Tensor) -> Tensor:
    """Squared distance of the latents' mean to 0 and of their channel covariance to 1; (B, 4, H, W).

    Unit variance alone leaves two channels free to say the same, and colours are then lost for want of room.
    """
    flat = latents.transpose(0, 1).flatten(1)  # (4, B * H * W)
    return flat.mean(1).square().sum() + (torch.cov(flat) - torch.eye(len(flat), device=flat.device)).square().sum()


def train_vae(work: Path, seconds: float, batch: int, steps: int | None = None) -> None:
    """Train within `seconds` (or `steps`) and write `work/vae.safetensors` (fp16) and `work/vae_sheet.png`."""
    workers = start_workers()
    torch.manual_seed(1000 + workers.rank)
    vae = build_vae().to(workers.device).to(memory_format=torch.channels_last)
    workers.broadcast_module(vae)
    banks = load_banks(work)
    composer = Composer(banks, workers.device)
    sampler, rng = SceneSampler(banks.sprite_rows, banks.avatar_rows), random.Random(1000 + workers.rank)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    encode, decode = _compiled(vae.encoder, workers), _compiled(vae.decoder, workers)
    schedule, frozen, began = Schedule(workers, seconds, steps), False, time.monotonic()
    progress = tqdm(disable=not workers.is_main, desc="vae", unit="step", mininterval=10)
    while schedule.advance():
        if not frozen and schedule.fraction >= FREEZE_AT:
            _normalise_encoder(vae, composer, sampler, workers)
            frozen = True
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * schedule.rate(200, 0.01)
        crops = _crops(composer, sampler, rng, batch)
        with torch.autocast(workers.device.type, torch.bfloat16, enabled=workers.device.type == "cuda"):
            with torch.set_grad_enabled(not frozen):
                latents = (vae.encoder if frozen else encode)(crops).float()
            spread = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, device=latents.device)
            restored = decode(latents + spread * torch.randn_like(latents)).float()
        loss = reconstruction_loss(restored, crops)
        if not frozen:
            loss = loss + 0.05 * whitening_loss(latents)
        loss.backward()
        workers.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.update()
        if schedule.step % 50 == 0 and workers.is_main:
            progress.set_postfix(loss=f"{loss.item():.4f}", done=f"{schedule.fraction:.2f}")
    progress.close()
    if workers.is_main:
        state = {key: value.half().contiguous() for key, value in vae.state_dict().items()}
        save_file({k: v.cpu() for k, v in vae_to_ldm(state).items()}, work / "vae.safetensors")
        _report(vae, composer, banks, work, schedule.step * batch * workers.count, time.monotonic() - began)
    stop_workers()


def _crops(composer: Composer, sampler: SceneSampler, rng: random.Random, batch: int) -> Tensor:
    """(B, 3, 128, 128): four crops from each of B / 4 scenes; one composition then serves four examples."""
    pictures = composer.draw([sampler.draw(rng) for _ in range(batch // 4)])
    crops = []
    for _ in range(4):
        y, x = rng.randrange(0, 129), rng.randrange(0, 129)
        crops.append(pictures[:, :, y : y + CROP, x : x + CROP])
    return torch.cat(crops).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _normalise_encoder(vae: torch.nn.Module, composer: Composer, sampler: SceneSampler, workers: Workers) -> None:
    """Fold the latents' mean and standard deviation, per channel, into the encoder's last convolution."""
    rng = random.Random(7)  # the same scenes in every process, so the same fold
    count = 64 if workers.device.type == "cuda" else 2
    pictures = [composer.draw([sampler.draw(rng) for _ in range(32)]) for _ in range(count)]
    latents = torch.cat([vae.encoder(picture) for picture in pictures])  # (N, 4, 32, 32)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    last = vae.encoder.layers[-1]
    last.weight /= std[:, None, None, None]
    last.bias.sub_(mean).div_(std)
    for parameter in vae.encoder.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    workers.broadcast_module(vae)


def _compiled(module: torch.nn.Module, workers: Workers):
    return torch.compile(module) if workers.device.type == "cuda" else module


@torch.no_grad()
def _report(vae, composer: Composer, banks, work: Path, samples: int, seconds: float) -> None:
    """PSNR on fresh scenes (any combination), latent statistics and a sheet: original above reconstruction."""
    sampler, rng = SceneSampler(banks.sprite_rows, banks.avatar_rows, train=False), random.Random(99)
    scenes = [sampler.draw(rng) for _ in range(256 if composer.device.type == "cuda" else 16)]
    errors, stds, means = [], [], []
    for start in range(0, len(scenes), 16):
        pictures = composer.draw(scenes[start : start + 16])
        latents = vae.encoder(pictures)
        restored = vae.decoder(latents).clamp(-1, 1)
        errors.append(((restored - pictures) ** 2).mean((1, 2, 3)) / 4)
        stds.append(latents.std().item())
        means.append(latents.mean().item())
        if start == 0:
            pair = torch.cat([pictures[:8], restored[:8]])
            write_sheet(work / "vae_sheet.png", pair, ["original"] * 8 + ["restored"] * 8)
    psnr = -10 * torch.cat(errors).log10()
    text = (
        f"vae: PSNR {psnr.mean().item():.2f} dB (worst {psnr.min().item():.2f}), latent mean {sum(means) / len(means):.3f}, "
        f"std {sum(stds) / len(stds):.3f}, {samples} crops in {seconds:.0f} s"
    )
    (work / "vae_report.txt").write_text(text + "\n", encoding="utf-8")
    tqdm.write(text)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with the rendered banks")
    parser.add_argument("--seconds", type=float, default=170, help="training time, compilation included")
    parser.add_argument("--batch", type=int, default=128, help="crops a step and process")
    parser.add_argument("--steps", type=int, help="count steps instead of seconds, for a dry run")
    args = parser.parse_args()
    train_vae(args.work, args.seconds, args.batch, args.steps)


if __name__ == "__main__":
    main()
