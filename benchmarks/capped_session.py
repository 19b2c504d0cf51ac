"""The process in which capped_card.py opens its file on an emulated card, samples three images and accounts for the memory, phase by phase.

Two ways to emulate the card. classic (--disable-dynamic-vram, torch's own allocator): torch may allocate no more than the budget.
default (ComfyUI's default flags: dynamic VRAM, cudaMallocAsync): the rest of the card is taken, so nothing else can have it either.
Peaks are over what was in use before the model was loaded: of tensors, of what torch took for them (reserved), and the driver's.
Dynamic VRAM keeps weights outside of torch: there only the driver's figure has them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from comfyui_session import GIB, environment, gpu_used, ram_used, start_comfyui

# GB of a card's that torch may have: without the driver's and the desktop's share, and the CUDA context (research: 3.2 of 4).
BUDGETS = {4: 3.2, 6: 5.1, 8: 7.1}
GB, MIB = 10**9, 2**20
IMAGES = 3
# Allocations shown of those that live at the peak.
MOST_SHOWN = 16


def emulate_card(card_gb: int, budget_gb: float, capped: bool = True) -> dict[str, float]:
    """Limit what torch can allocate, and show ComfyUI a card of that size. Before ComfyUI is imported: it asks then.

    Args: capped: limit torch's allocator; else take the rest of the card.
    Returns: what is in use already, which a smaller card has too: the CUDA context.
    """
    import torch

    real = torch.cuda.mem_get_info
    torch.zeros(1, device="cuda")
    free, total = real()
    before = total - free
    if capped:
        torch.cuda.set_per_process_memory_fraction(budget_gb * GB / total)
    else:
        emulate_card.taken = torch.empty(free - int(budget_gb * GB), dtype=torch.uint8, device="cuda")
        before = total - real()[0]

    def emulated(device: object = None) -> tuple[int, int]:
        free, _ = real(device)
        used = total - free - before
        return max(0, int(budget_gb * GB) - used), card_gb * GB

    torch.cuda.mem_get_info = emulated
    return {"context GiB": (total - free) / GIB}


class Peaks:
    """The largest figure of a function since the last `take`, asked every 2 ms."""

    def __init__(self, used: Callable[[], int]) -> None:
        self._used, self._before, self._peak = used, used(), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def take(self) -> float:
        """GiB over what was in use at the beginning."""
        self._note()
        peak, self._peak = self._peak, 0
        return peak / GIB

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._note()

    def _note(self) -> None:
        self._peak = max(self._peak, self._used() - self._before)


class Phases:
    """Peaks of memory of each part of a session: name -> GiB of tensors, reserved, of the driver."""

    def __init__(self, cpu: bool) -> None:
        import torch

        self.found: dict[str, dict[str, float]] = {}
        self._cuda, self._peaks = None if cpu else torch.cuda, None if cpu else Peaks(gpu_used)
        self._before = (0, 0) if cpu else (torch.cuda.memory_allocated(), torch.cuda.memory_reserved())

    def end(self, name: str) -> None:
        """What was since the last end."""
        if self._cuda is None:
            return
        self._cuda.synchronize()
        peaks = (self._cuda.max_memory_allocated(), self._cuda.max_memory_reserved())
        tensors, reserved = ((peak - before) / GIB for peak, before in zip(peaks, self._before, strict=True))
        now = {"tensors": tensors, "reserved": reserved, "driver": self._peaks.take()}
        old = self.found.get(name, now)
        self.found[name] = {kind: max(value, old[kind]) for kind, value in now.items()}
        self._cuda.reset_peak_memory_stats()

    def largest(self, kind: str) -> float:
        return max(phase[kind] for phase in self.found.values())


def sample(model: Any, size: Any, prompts: list, steps: int, seed: int, callback: Callable | None = None) -> Any:
    import comfy.sample
    import torch

    latent = torch.zeros(1, 4, size.latent, size.latent)
    noise = comfy.sample.prepare_noise(latent, seed)
    options = {"disable_pbar": True, "seed": seed, "callback": callback}
    return comfy.sample.sample(model, noise, steps, 4.0, "euler", "normal", *prompts, latent, **options)


def first_image(model: Any, size: Any, prompts: list, steps: int, phases: Phases) -> Any:
    """Its phases: the weights' way into VRAM, the first step, the second (which a graph is recorded in), the others."""
    from comfy.patcher_extension import CallbacksMP

    model = model.clone()
    model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "phases", lambda _: phases.end("weights loaded"))
    names = ("first step", "second step")
    return sample(model, size, prompts, steps, 0, lambda step, *_: phases.end(names[step] if step < 2 else "other steps"))


def images_of(model: Any, size: Any, prompts: list, arguments: argparse.Namespace) -> dict[str, Any]:
    """The record of three images with one acceleration."""
    phases = Phases(arguments.cpu)
    images = [first_image(model, size, prompts, arguments.steps, phases)]
    phases.end("other steps")
    for seed in range(1, IMAGES):
        images.append(sample(model, size, prompts, arguments.steps, seed))
        phases.end("other images")
    record: dict[str, Any] = {"images": sum(bool(image.isfinite().all()) for image in images)}
    record["runner"] = model.model.stepquant.runner.describe()
    record["offloaded"] = bool(not arguments.cpu and model.loaded_size() < model.model_size())
    if not arguments.cpu:
        record |= {"phases": phases.found, "loaded GiB": model.loaded_size() / GIB, "reserved for": segments()}
        record |= {f"{kind} peak GiB": phases.largest(kind) for kind in ("tensors", "reserved", "driver")}
    return record


def segments() -> dict[str, str]:
    """What torch's own allocator holds: pool -> MiB in use of MiB taken. Empty of another allocator."""
    import torch

    if torch.cuda.get_allocator_backend() != "native":
        return {}
    held: Counter = Counter()
    for segment in torch.cuda.memory_snapshot():
        pool = "graph" if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0) else f"stream {int(segment['stream'] != 0)}"
        name = f"{pool}, {segment['segment_type']} blocks"
        held[name, "used"] += segment["active_size"]
        held[name, "taken"] += segment["total_size"]
    return {name: f"{held[name, 'used'] / MIB:.1f} of {held[name, 'taken'] / MIB:.1f}" for name, kind in held if kind == "taken"}


def live_at_peak(work: Callable[[], object]) -> list[str]:
    """The largest allocations of `work` that live when its tensors take most, with where they were made. torch's own allocator only."""
    import torch

    torch.cuda.memory._record_memory_history(enabled="all", context="alloc", stacks="python", max_entries=500_000)
    try:
        work()
        events = torch.cuda.memory._snapshot()["device_traces"][0]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    live: dict[int, tuple[int, str]] = {}
    now = peak = 0
    at_peak: Counter = Counter()
    for event in events:
        if event["action"] == "alloc":
            live[event["addr"]] = (event["size"], _place(event.get("frames", ())))
            now += event["size"]
        elif event["action"] == "free_requested" and event["addr"] in live:
            now -= live.pop(event["addr"])[0]
        if now > peak:
            peak, at_peak = now, Counter(live.values())
    largest = sorted(at_peak.items(), key=lambda item: -item[0][0] * item[1])[:MOST_SHOWN]
    return [f"{peak / MIB:.1f} MiB in all"] + [f"{count} x {size / MIB:.2f} MiB {place}" for (size, place), count in largest]


def _place(frames: Any) -> str:
    ours = [frame for frame in frames if "stepquant" in frame["filename"] or os.sep + "comfy" + os.sep in frame["filename"]]
    return " < ".join(f"{os.path.basename(frame['filename'])}:{frame['line']} {frame['name']}" for frame in ours[:5])


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Open the file; sample the images with each acceleration. In a process whose memory is limited."""
    import comfy.model_management
    import speed_models
    import torch

    from stepquant.hosts.acceleration import Acceleration
    from stepquant.hosts.comfy.loader import load_quantized

    size = speed_models.TINY if arguments.tiny else speed_models.SDXL
    prompts = [speed_models.conditioning(size, seed) for seed in (1, 2)]
    ram, start = Peaks(ram_used), time.perf_counter()
    model = load_quantized(arguments.file).model
    opened = {"load s": time.perf_counter() - start, "load peak RAM GiB": ram.take(), "model GiB": model.model_size() / GIB}
    ram.close()
    records = []
    for acceleration in arguments.accelerations:
        model.model.stepquant.acceleration = Acceleration(acceleration)
        record = {"acceleration": acceleration, **opened, **images_of(model, size, prompts, arguments)}
        if not arguments.cpu:
            record["allocator"] = f"{torch.cuda.get_allocator_backend()} {os.environ.get('PYTORCH_CUDA_ALLOC_CONF', '')}".strip()
            if acceleration == "fused" and torch.cuda.get_allocator_backend() == "native":
                record["live at the peak"] = live_at_peak(lambda: sample(model, size, prompts, 1, 0))
        records.append(record)
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--card", type=int, choices=BUDGETS, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--flags", choices=("classic", "default"), default="classic")
    parser.add_argument("--accelerations", nargs="+", default=["auto", "fused"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    is_default = arguments.flags == "default" and not arguments.cpu
    if is_default:  # ComfyUI's choice of allocator is made before torch is imported
        sys.path.insert(0, os.path.abspath(os.environ["COMFYUI_PATH"]))
        import cuda_malloc  # noqa: F401 - it sets the environment variable that torch reads
    facts = {} if arguments.cpu else emulate_card(arguments.card, BUDGETS[arguments.card], capped=not is_default)
    dynamic = start_comfyui(dynamic=is_default, cpu=arguments.cpu)
    if arguments.tiny:
        import speed_models

        speed_models.register_tiny()
    import torch

    with torch.inference_mode():  # as ComfyUI runs a prompt
        for record in run(arguments):
            record = {"flags": arguments.flags, **facts, **record, **({} if arguments.cpu else environment(dynamic))}
            sys.stdout.write("\n" + json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
