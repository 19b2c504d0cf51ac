"""A 4 GB card's budget on a larger GPU: a full-size W4A8 SDXL UNet in ComfyUI, three images without offload, and its peak VRAM.

    COMFYUI_PATH=<a ComfyUI checkout> python capped_card.py [--out results.jsonl] [--card 4] [--steps 8] [--activations token static]

For each kind of activations it writes a file of random codes (their sizes are a real model's), and a process of its own, whose
torch may allocate no more than the card's budget and whose ComfyUI sees such a card, opens it and samples three images of
1024x1024 with CFG. Emulated is memory only: not speed, and not what lies outside of torch's allocator, which the driver's figure
has. The classic memory management: dynamic VRAM does not allocate through torch. Exit code 1 if a limit is missed.

Peaks, over what was in use before the first image: of tensors, as speed.py has it; of what torch took for them; and the driver's,
with the code of the kernels. The last two depend on the allocator: PYTORCH_CUDA_ALLOC_CONF is passed on, and recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from comfyui_session import GIB, PeakMemory, environment, ram_used, start_comfyui

PRESET = "w4a8-token"
# GB of a card's that torch may have: without the driver's and the desktop's share, and the CUDA context (research: 3.2 of 4).
BUDGETS = {4: 3.2, 6: 5.1, 8: 7.1}
GB = 10**9
IMAGES = 3
# torch gives cuBLAS 32 MiB per stream on Hopper, and this much on every card of 4 GB.
CUBLAS_WORKSPACE = ":4096:2:16:8"
# Issue 6's limits.
FILE_LIMIT_GIB, PEAK_LIMIT_GIB = 1.45, 1.9
# Opening a file may take its own size in RAM, and this for ComfyUI's modules and the tensors that stay 16 bit.
LOAD_RAM_MARGIN_GIB = 0.4
FOLDER = Path(__file__).parent


def unet_shapes(tiny: bool) -> dict[str, tuple[int, ...]]:
    if tiny:
        import speed_models

        speed_models.register_tiny()
        import tiny_sdxl

        return {key: tuple(tensor.shape) for key, tensor in tiny_sdxl.unet_tensors().items()}
    from dynamic_vram import sdxl_shapes

    return sdxl_shapes()


def write_random(path: Path, shapes: Mapping[str, tuple[int, ...]], static: bool) -> None:
    """A StepQuant file of the preset, or the same with static activations: random codes, scaled so that layers have unit gain."""
    import torch

    from stepquant.quant.file_format import QuantizedModel, write_model
    from stepquant.quant.layers import find_layers
    from stepquant.quant.recipe import preset_recipe
    from stepquant.version import VERSION

    generator = torch.Generator().manual_seed(0)
    recipe = preset_recipe(PRESET, find_layers(shapes))
    recipe = with_static_activations(recipe) if static else recipe
    layers = {name: random_layer(shapes, name, scheme, generator) for name, scheme in recipe.schemes.items()}
    ours = {f"{name}.{part}" for name in layers for part in ("weight", "bias")}
    rest = {key: random_tensor(key, shape, generator) for key, shape in shapes.items() if key not in ours}
    write_model(path, QuantizedModel(layers, rest, recipe), VERSION)


def with_static_activations(recipe: Any) -> Any:
    """The recipe with stored scales wherever w8a8-static has them."""
    from dataclasses import replace

    from stepquant.quant.layers import has_symmetric_input, needs_row_scales
    from stepquant.quant.scheme import ActivationMode

    schemes = {
        name: replace(scheme, activation=ActivationMode.STATIC, symmetric=has_symmetric_input(name))
        if scheme.activation is ActivationMode.TOKEN and not needs_row_scales(name)
        else scheme
        for name, scheme in recipe.schemes.items()
    }
    return replace(recipe, schemes=schemes)


def random_layer(shapes: Mapping[str, tuple[int, ...]], name: str, scheme: Any, generator: Any) -> Any:
    import torch

    from stepquant.quant.file_format import QuantizedLayer
    from stepquant.quant.int4 import GROUP_SIZE, MAX_GROUP_SCALE
    from stepquant.quant.timestep import NUM_BUCKETS

    shape = shapes[f"{name}.weight"]
    N, inputs = shape[0], torch.Size(shape[1:]).numel()

    def scale_of(deviation: float) -> torch.Tensor:
        return torch.full((N,), 1 / (deviation * inputs**0.5))

    if scheme.is_int4:
        blocks = -(-inputs // (2 * GROUP_SIZE))
        codes = torch.randint(0, 256, (N, blocks * GROUP_SIZE), generator=generator, dtype=torch.uint8)
        groups = torch.randint(1, MAX_GROUP_SCALE + 1, (inputs // GROUP_SIZE, N), generator=generator, dtype=torch.int8)
        layer = QuantizedLayer(codes, scale_of(42.0), group_scale=groups)  # of a uniform nibble times a uniform scale
    else:
        stored = shape if len(shape) == 2 else (N, *shape[2:], shape[1])
        codes = torch.randint(-127, 128, stored, generator=generator, dtype=torch.int8)
        layer = QuantizedLayer(codes, scale_of(73.0))
    layer.bias = torch.zeros(N).half() if f"{name}.bias" in shapes else None
    if scheme.is_static:
        layer.act_scale = torch.full((NUM_BUCKETS,), 5 / 127 if scheme.symmetric else 5 / 255)
        layer.act_zero_point = None if scheme.symmetric else torch.full((NUM_BUCKETS,), -110, dtype=torch.int32)
    return layer


def random_tensor(key: str, shape: tuple[int, ...], generator: Any) -> Any:
    import torch

    if len(shape) < 2:
        return torch.full(shape, 1.0 if key.endswith("weight") else 0.0).half()
    return (torch.randn(shape, generator=generator) / torch.Size(shape[1:]).numel() ** 0.5).half()


def emulate_card(card_gb: int, budget_gb: float) -> dict[str, float]:
    """Limit torch's allocator, and show ComfyUI a card of that size. Before ComfyUI is imported: it asks then.

    Returns: what is in use already, which a smaller card has too: the CUDA context.
    """
    import torch

    real = torch.cuda.mem_get_info
    torch.zeros(1, device="cuda")
    free, total = real()
    torch.cuda.set_per_process_memory_fraction(budget_gb * GB / total)
    before = total - free

    def emulated(device: object = None) -> tuple[int, int]:
        free, _ = real(device)
        used = total - free - before
        return max(0, int(budget_gb * GB) - used), card_gb * GB

    torch.cuda.mem_get_info = emulated
    return {"context GiB": before / GIB}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Open the file, sample the images. In a process whose memory is limited."""
    import speed_models
    import torch

    from stepquant.hosts.comfy.loader import load_quantized

    size = speed_models.TINY if arguments.tiny else speed_models.SDXL
    prompts = [speed_models.conditioning(size, seed) for seed in (1, 2)]
    with RamPeak() as ram:
        start = time.perf_counter()
        model = load_quantized(arguments.run).model
        seconds = time.perf_counter() - start
    record: dict[str, Any] = {"load s": seconds, "load peak RAM GiB": ram.gib, "model GiB": model.model_size() / GIB}
    if arguments.cpu:
        images = [sample(model, size, prompts, arguments.steps, seed) for seed in range(IMAGES)]
    else:
        torch.cuda.reset_peak_memory_stats()
        with PeakMemory() as peak:
            images = [sample(model, size, prompts, arguments.steps, seed) for seed in range(IMAGES)]
        record |= {"tensors' peak GiB": torch.cuda.max_memory_allocated() / GIB, "torch's peak GiB": torch.cuda.max_memory_reserved() / GIB}
        record |= {"driver's peak GiB": peak.gpu_gib, "loaded GiB": model.loaded_size() / GIB}
        record |= {"runner": model.model.stepquant.runner.describe(), "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "default")}
    record["images"] = sum(bool(image.isfinite().all()) for image in images)
    record["offloaded"] = bool(not arguments.cpu and model.loaded_size() < model.model_size())
    return record


class RamPeak:
    """Most RAM in use while the block runs, over what was in use before; see comfyui_session.ram_used."""

    def __enter__(self) -> RamPeak:
        import threading

        self._before, self.gib, self._stop = ram_used(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._note()

    def _note(self) -> None:
        self.gib = max(self.gib, (ram_used() - self._before) / GIB)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._note()


def sample(model: Any, size: Any, prompts: list, steps: int, seed: int) -> Any:
    import comfy.sample
    import torch

    latent = torch.zeros(1, 4, size.latent, size.latent)
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(model, noise, steps, 4.0, "euler", "normal", *prompts, latent, disable_pbar=True, seed=seed)


def child(arguments: argparse.Namespace) -> int:
    facts = {} if arguments.cpu else emulate_card(arguments.card, BUDGETS[arguments.card])
    start_comfyui(dynamic=False, cpu=arguments.cpu)
    if arguments.tiny:
        import speed_models

        speed_models.register_tiny()
    import torch

    with torch.inference_mode():  # as ComfyUI runs a prompt
        record = facts | run(arguments)
    sys.stdout.write("\n" + json.dumps(record if arguments.cpu else record | environment(False)) + "\n")
    return 0


def limits(record: Mapping[str, Any], cpu: bool) -> dict[str, bool]:
    """What must hold, and whether it does."""
    checks: dict[str, Callable[[], bool]] = {
        f"file at most {FILE_LIMIT_GIB} GiB": lambda: record["file GiB"] <= FILE_LIMIT_GIB,
        "opened in the file's size of RAM": lambda: record["load peak RAM GiB"] <= record["file GiB"] + LOAD_RAM_MARGIN_GIB,
        f"{IMAGES} images": lambda: record["images"] == IMAGES,
        "no offload": lambda: not record["offloaded"],
        f"tensors' peak at most {PEAK_LIMIT_GIB} GiB": lambda: cpu or record["tensors' peak GiB"] <= PEAK_LIMIT_GIB,
    }
    return {name: check() for name, check in checks.items()}


def measured(path: Path, activations: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The record of one child process; without figures and with its last words if it failed."""
    command = [sys.executable, __file__, "--run", str(path), "--card", str(arguments.card), "--steps", str(arguments.steps)]
    command += [flag for flag, given in (("--tiny", arguments.tiny), ("--cpu", arguments.cpu)) if given]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER, env=environment_of_child(), check=False)
    facts = {"activations": activations, "file GiB": path.stat().st_size / GIB, "card GB": arguments.card}
    if answer.returncode:
        return facts | {"error": (answer.stdout + answer.stderr)[-2000:]}
    return facts | json.loads(answer.stdout.splitlines()[-1])


def environment_of_child() -> dict[str, str]:
    return {"CUBLAS_WORKSPACE_CONFIG": CUBLAS_WORKSPACE, **os.environ}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    parser.add_argument("--card", type=int, choices=BUDGETS, default=4, help="GB of the card that is emulated")
    parser.add_argument("--steps", type=int, default=8, help="of each image")
    parser.add_argument("--activations", nargs="+", choices=("token", "static"), default=["token", "static"])
    parser.add_argument("--tiny", action="store_true", help="the tests' small model")
    parser.add_argument("--cpu", action="store_true", help="no GPU: nothing is emulated, and no VRAM measured")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        return child(arguments)
    start_comfyui(dynamic=False, cpu=True)
    shapes, failed = unet_shapes(arguments.tiny), False
    for activations in arguments.activations:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"sdxl-w4a8-{activations}.safetensors"
            write_random(path, shapes, activations == "static")
            record = measured(path, activations, arguments)
        checks = {"the images are made": False} if "error" in record else limits(record, arguments.cpu)
        failed |= not all(checks.values())
        sys.stdout.write(f"{activations}: " + ", ".join(f"{key} {_shown(value)}" for key, value in record.items()) + "\n")
        sys.stdout.write("".join(f"  {'ok  ' if holds else 'FAIL'} {name}\n" for name, holds in checks.items()))
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record | {"kind": "capped card", "checks": checks}) + "\n")
    return 1 if failed else 0


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
