"""How long learning the rounding of 4-bit weights takes on a CPU (`reconstruct`: AdaRound's and BRECQ's place): the demo model, all blocks.

    taskset -c 0,1 python benchmarks/rounding_time.py [--threads 2] [--iterations 200] [--folder DIR] [--out benchmarks/results]

Sampling the prompts, GPTQ's start and handing inputs on from block to block are counted; loading the model is not. One JSON line is
appended to rounding_time.jsonl. With --folder what was learned is kept, for STEPQUANT_ROUNDED (quality_int4_rows.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from quality_int4_rows import MIXED, rounding_prompts

from stepquant.demo.pipeline import load_demo_pipeline
from stepquant.demo.record import command_line, environment, quality_record
from stepquant.demo.run import MODEL_NAME
from stepquant.hosts.diffusers.quantize import unet_shapes
from stepquant.hosts.diffusers.reconstruct import Reconstruction, reconstruct, reconstructed_layers
from stepquant.quant.layers import find_layers
from stepquant.quant.recipe import preset_recipe
from stepquant.quant.rounding.block import Training

PROMPTS = 24


def main() -> None:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=Training().iterations, help="of each block")
    parser.add_argument("--folder", type=Path, help="for what was learned; must be empty or missing. A temporary one if left out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        record = _timed(args, args.folder or Path(temporary))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "rounding_time.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    _say("{seconds:.0f} s, {cpu_seconds:.0f} s of CPU".format(**record))


def _timed(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    pipeline = load_demo_pipeline()
    recipe = preset_recipe(MIXED, find_layers(unet_shapes(pipeline.unet)))
    blocks = len(reconstructed_layers(pipeline.unet, recipe))
    start, cpu = time.perf_counter(), time.process_time()

    def say(done: int, _total: int) -> None:
        if done % args.iterations == 0:
            _say(f"{done // args.iterations} of {blocks} blocks, {time.perf_counter() - start:.0f} s")

    how = Reconstruction(training=Training(args.iterations))
    reconstruct(pipeline, recipe, rounding_prompts()[:PROMPTS], folder, how, progress=say)
    record = quality_record("rounding_time", MODEL_NAME, f"{MIXED}-reconstruct", None, 0, command_line())
    record = {key: record[key] for key in ("kind", "model", "mode", "commit", "command", "utc")}
    record["commit"] = record["commit"] or os.environ.get("STEPQUANT_COMMIT")
    times = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    settings = {"blocks": blocks, "iterations": args.iterations, "prompts": PROMPTS, "threads": args.threads, "cores": cores}
    return record | times | {"settings": settings} | environment()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
