"""Trains the UNet and both text encoders together within a time budget, from scratch or from earlier weights.

    torchrun --nproc-per-node N -m stepquant.demo.recipe.train --work WORK --seconds 620
Writes `unet.safetensors` and `text_encoders.safetensors` (fp16, running average) and a sample sheet every two minutes.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..architecture import build_scheduler, build_text_encoders, build_unet, encode_prompt_ids
from ..ldm_state import text_from_ldm, text_to_ldm, unet_from_ldm, unet_to_ldm
from ..pipeline import load_module_state
from .captions import CaptionVocabulary
from .data import load_banks
from .latents import LatentPool, load_trained_vae, pool_path
from .pictures import write_sheet
from .sampling import sample_latents
from .scenes import SceneSampler, full_caption
from .workers import Schedule, Workers, start_workers, stop_workers

PEAK_RATE = 7e-4
TOKEN_RATE_FACTOR = 2.5  # a token row gets a gradient only when its word occurs
WARMUP_STEPS = 400
RATE_FLOOR = 0.02
CAPTION_DROP = 0.10  # for classifier-free guidance
MIN_SNR_GAMMA = 5.0  # Hang et al., arXiv 2303.09556
# As SDXL's own training: lets the first steps disobey the noise's mean, which decides plain backgrounds.
OFFSET_NOISE = 0.08


class Trainer:
    """Modules, optimizer and running average of one training run."""

    def __init__(self, workers: Workers, vocabulary: CaptionVocabulary, resume: Path | None):
        self.workers, self.vocabulary = workers, vocabulary
        self.unet = build_unet()
        self.text_l, self.text_g = build_text_encoders(len(vocabulary), vocabulary.eos_row)
        if resume is not None:
            self._load(resume)
        for module in (self.unet, self.text_l, self.text_g):
            module.to(workers.device)
            workers.broadcast_module(module)
        self.unet.to(memory_format=torch.channels_last)
        named = [(name, parameter) for module in (self.unet, self.text_l, self.text_g) for name, parameter in module.named_parameters()]
        self.parameters = [parameter for _, parameter in named]
        tables = [p for name, p in named if "token_embedding" in name]
        vectors = [p for name, p in named if "token_embedding" not in name and p.ndim < 2]
        matrices = [p for name, p in named if "token_embedding" not in name and p.ndim >= 2]
        groups = [
            {"params": matrices, "peak": PEAK_RATE, "weight_decay": 0.01},
            {"params": vectors, "peak": PEAK_RATE, "weight_decay": 0.0},
            {"params": tables, "peak": PEAK_RATE * TOKEN_RATE_FACTOR, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.99), fused=workers.device.type == "cuda")
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.predict = torch.compile(self.unet) if workers.device.type == "cuda" else self.unet
        betas = build_scheduler().betas
        self.alphas = torch.cumprod(1 - betas, 0).to(workers.device)  # (1000,)

    def compile(self, batch: int) -> None:
        """Run one step on noise and forget it: the compiler works while earlier stages still prepare the data."""
        noise = torch.randn(batch, 4, 32, 32, device=self.workers.device)
        rows = self._empty_rows.expand(batch, -1)
        self._loss(noise, rows, torch.full((batch, 6), 256.0, device=self.workers.device)).backward()
        self.optimizer.zero_grad()

    def step(self, pool: LatentPool, batch: int, schedule: Schedule) -> Tensor:
        """One optimizer step on a random batch; returns the loss without waiting for it."""
        device = self.workers.device
        index = torch.randint(len(pool.latents), (batch,), device=device)
        loss = self._loss(pool.latents[index].float(), pool.rows[index].long(), pool.sizes[index])
        loss.backward()
        self.workers.average_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * schedule.rate(WARMUP_STEPS, RATE_FLOOR)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(0.9995, (1 + schedule.step) / (20 + schedule.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return loss.detach()

    def _loss(self, latents: Tensor, rows: Tensor, sizes: Tensor) -> Tensor:
        """Min-SNR weighted eps error; latents (B, 4, 32, 32) fp32, rows (B, 77), sizes (B, 6)."""
        count, device = len(latents), latents.device
        dropped = torch.rand(count, 1, device=device) < CAPTION_DROP
        rows = torch.where(dropped, self._empty_rows, rows)
        # One timestep in each of B equal slices: the same distribution, less noise in the gradient.
        slices = torch.arange(count, device=device) + torch.rand(count, device=device)
        timesteps = (slices * (1000 / count)).long().clamp(max=999)
        alpha = self.alphas[timesteps][:, None, None, None]
        noise = torch.randn_like(latents) + OFFSET_NOISE * torch.randn(count, 4, 1, 1, device=device)
        noisy = (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            context, pooled = self._encode(rows)
            conditions = {"text_embeds": pooled, "time_ids": sizes}
            eps = self.predict(noisy, timesteps, context, added_cond_kwargs=conditions, return_dict=False)[0]
        snr = alpha.flatten() / (1 - alpha.flatten())
        weight = snr.clamp(max=MIN_SNR_GAMMA) / snr
        return (weight * ((eps.float() - noise) ** 2).mean((1, 2, 3))).mean()

    @property
    def _empty_rows(self) -> Tensor:
        if not hasattr(self, "_empty"):
            self._empty = self.vocabulary.rows([""]).long().to(self.workers.device)
        return self._empty

    def _encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return encode_prompt_ids(self.text_l, self.text_g, rows, self.vocabulary.pad_for_g(rows))

    def swap_average(self) -> None:
        """Exchange the trained parameters with their running average, in place; call twice to undo."""
        for parameter, averaged in zip(self.parameters, self.average, strict=True):
            kept = parameter.detach().clone()
            parameter.data.copy_(averaged)
            averaged.copy_(kept)

    @torch.no_grad()
    def sample(self, captions: list[str], vae: torch.nn.Module) -> Tensor:
        """Pictures (B, 3, 256, 256) of the modules as they are."""
        with torch.autocast(self.workers.device.type, torch.bfloat16, enabled=self.workers.device.type == "cuda"):
            prompt = self._encode(self.vocabulary.rows(captions).long().to(self.workers.device))
            empty = self._encode(self._empty_rows)
        return vae.decoder(sample_latents(self.unet, prompt, empty))

    def save(self, folder: Path) -> None:
        """Write both weight files, fp16, under SDXL's names; replaces them whole."""
        half = [
            {key: value.detach().half().cpu().contiguous() for key, value in module.state_dict().items()}
            for module in (self.unet, self.text_l, self.text_g)
        ]
        _replace(folder / "unet.safetensors", unet_to_ldm(half[0]))
        _replace(folder / "text_encoders.safetensors", text_to_ldm(half[1], half[2], self.vocabulary.used_ids))

    def _load(self, folder: Path) -> None:
        load_module_state(self.unet, unet_from_ldm(load_file(folder / "unet.safetensors")))
        for module, state in zip((self.text_l, self.text_g), text_from_ldm(load_file(folder / "text_encoders.safetensors")), strict=True):
            load_module_state(module, state)


def train(args: argparse.Namespace) -> None:
    """Compile, wait for the encoded scenes, train until `args.seconds` are over; save and draw sheets on the way."""
    deadline = time.monotonic() + args.seconds
    workers = start_workers()
    torch.manual_seed(2000 + workers.rank)
    _wait_for(args.work / "banks.json", deadline)
    banks = load_banks(args.work)
    trainer = Trainer(workers, CaptionVocabulary(banks), args.work if args.resume else None)
    trainer.compile(args.batch)
    _wait_for(pool_path(args.work, workers.rank), deadline)
    pool = LatentPool.load(args.work, workers.rank, workers.device)
    vae = load_trained_vae(args.work, workers.device)
    captions = _sheet_captions(banks)
    schedule = Schedule(workers, deadline - time.monotonic(), args.steps, args.start_fraction)
    saved = began = time.monotonic()
    progress = tqdm(disable=not workers.is_main, desc="train", unit="step", mininterval=10)
    while schedule.advance():
        loss = trainer.step(pool, args.batch, schedule)
        progress.update()
        if workers.is_main and schedule.step % 100 == 0:
            rate = schedule.step * args.batch * workers.count / (time.monotonic() - began)
            progress.set_postfix(loss=f"{loss.item():.4f}", done=f"{schedule.fraction:.3f}", images_s=f"{rate:.0f}")
        if workers.is_main and time.monotonic() - saved > args.save_seconds:
            _save_and_draw(trainer, vae, args.work, captions, f"sheet_{int(time.monotonic() - began):04d}s.png")
            saved = time.monotonic()
    progress.close()
    if workers.is_main:
        samples = schedule.step * args.batch * workers.count
        text = f"train: {schedule.step} steps, {samples} samples, pool {len(pool.latents)} x {workers.count}, "
        text += f"{time.monotonic() - began:.0f} s on {workers.count} process(es), last loss {loss.item():.4f}"
        (args.work / "train_report.txt").write_text(text + "\n", encoding="utf-8")
        tqdm.write(text)
        _save_and_draw(trainer, vae, args.work, captions, "sheet_final.png")
    stop_workers()


def _wait_for(path: Path, deadline: float) -> None:
    """Block until an earlier stage, running beside this one, has written the file."""
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path}: still missing when the time was over; needed from the stage before. Run that first.")
        time.sleep(0.5)


def _save_and_draw(trainer: Trainer, vae: torch.nn.Module, work: Path, captions: list[str], name: str) -> None:
    trainer.swap_average()
    trainer.save(work)
    write_sheet(work / name, trainer.sample(captions, vae), captions)
    trainer.swap_average()


def _sheet_captions(banks) -> list[str]:
    """A fixed mix: 32 singles, 4 pairs, 6 counts and 6 avatars from the trained combinations."""
    sampler, rng = SceneSampler(banks.sprite_rows, banks.avatar_rows), random.Random(11)
    kinds = ["single"] * 32 + ["pair"] * 4 + ["count"] * 6 + ["avatar"] * 6
    return [full_caption(sampler.draw(rng, kind)) for kind in kinds]


def _replace(path: Path, state: dict[str, Tensor]) -> None:
    """Write beside the old file and rename, so that a reader never sees half a file."""
    fresh = path.with_suffix(".new")
    save_file(state, fresh)
    fresh.replace(path)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with the rendered banks and vae.safetensors")
    parser.add_argument("--seconds", type=float, default=620, help="time for compiling, waiting for the encoded scenes and training")
    parser.add_argument("--batch", type=int, default=256, help="examples a step and process")
    parser.add_argument("--save-seconds", type=float, default=120, help="time between saved weights and sheets")
    parser.add_argument("--resume", action="store_true", help="go on from the weights in --work")
    parser.add_argument("--start-fraction", type=float, default=0.0, help="part of the schedule already done, with --resume")
    parser.add_argument("--steps", type=int, help="count steps instead of seconds, for a dry run")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
