"""Runs the whole recipe within one time budget: render, VAE, encode, train, evaluate; on all GPUs of one machine.

    python -m stepquant.demo.recipe.chain --pack PACK --work WORK --seconds 1100
The training process starts first and compiles while the data are made. A stage whose result is in WORK already is left
out, so the same command goes on after an interruption; WORK may also be filled from an earlier machine's results.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

PACKAGE = __package__  # __name__ is __main__ when run as a program
# Share of the whole budget. What rendering, compiling and starting take is left to the training to absorb.
ENCODE_SHARE = 0.05


def run_chain(args: argparse.Namespace) -> None:
    """Run the missing stages; raises CalledProcessError where one fails, and ends the training beside it."""
    deadline = time.monotonic() + args.seconds - args.evaluation_seconds
    processes = max(1, torch.cuda.device_count())
    args.work.mkdir(parents=True, exist_ok=True)
    train = ["--work", args.work, "--seconds", deadline - time.monotonic(), "--batch", args.batch]
    if args.start_fraction > 0:
        train += ["--resume", "--start-fraction", args.start_fraction]
    training = subprocess.Popen(_command("train", processes, *train))
    try:
        if not (args.work / "banks.json").exists():
            _run("data", 0, "--pack", args.pack, "--out", args.work)
        if not (args.work / "vae.safetensors").exists():
            _run("train_vae", processes, "--work", args.work, "--seconds", args.vae_share * args.seconds)
        if not (args.work / "pool_0.safetensors").exists():
            _run("latents", processes, "--work", args.work, "--seconds", ENCODE_SHARE * args.seconds)
        if training.wait() != 0:
            raise subprocess.CalledProcessError(training.returncode, "train")
    finally:
        training.terminate()
        training.wait()
    if args.images > 0:
        out = args.work / "evaluation"
        _run("evaluate", 0, "--work", args.work, "--model", args.work, "--out", out, "--images", args.images)


def _command(stage: str, processes: int, *arguments: object) -> list[str]:
    launcher = [sys.executable, "-m"]
    if processes > 1:
        # Two groups live side by side on one machine; a fixed port would be taken by the first.
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return [*launcher, f"{PACKAGE}.{stage}", *map(str, arguments)]


def _run(stage: str, processes: int, *arguments: object) -> None:
    subprocess.run(_command(stage, processes, *arguments), check=True)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pack", type=Path, required=True, help="folder of the demo pack")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything made; kept between runs")
    parser.add_argument("--seconds", type=float, default=1100, help="the whole budget, evaluation included")
    parser.add_argument("--batch", type=int, default=256, help="training examples a step and process")
    parser.add_argument("--start-fraction", type=float, default=0.0, help="go on from weights in WORK at this part of the schedule")
    parser.add_argument("--vae-share", type=float, default=0.16, help="part of the budget in which the VAE is trained")
    parser.add_argument("--images", type=int, default=512, help="pictures in each of the five evaluation sets; 0: no evaluation")
    parser.add_argument("--evaluation-seconds", type=float, default=75, help="part of the budget kept for the evaluation")
    run_chain(parser.parse_args())


if __name__ == "__main__":
    main()
