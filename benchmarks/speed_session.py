"""As the artist gets it: one ComfyUI session with default flags that makes two pictures. Run by speed.py, which reads its last line.

    COMFYUI_PATH=<a ComfyUI checkout> python speed_session.py --mode fp16|int8 --source unet.safetensors [--steps 20] [--tiny --cpu]

Default flags mean dynamic VRAM and ComfyUI's own choice of allocator. Between the pictures the VAE decodes and another
model is loaded and run. A picture's time is that of the whole sampling call, loading of weights included.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from comfyui_session import GIB, PeakMemory, start_comfyui

PRESET = "w8a8-token"


class Session:
    def __init__(self, arguments: argparse.Namespace) -> None:
        import speed_models

        self.size = speed_models.TINY if arguments.tiny else speed_models.SDXL
        self.steps, self.cpu = arguments.steps, arguments.cpu
        self.positive, self.negative = speed_models.conditioning(self.size, 1), speed_models.conditioning(self.size, 2)
        self.model = speed_models.load_fp16(arguments.source)
        self.other = speed_models.load_fp16(arguments.source)
        self.vae = None if arguments.cpu else speed_models.random_vae()
        if arguments.mode == "int8":
            from stepquant.hosts.comfy.quantize import quantize_model

            self.model = quantize_model(self.model, PRESET)

    def sample(self, model: object, steps: int, seed: int, times: list[float] | None = None) -> object:
        import comfy.sample
        import torch

        latent = torch.zeros(1, 4, self.size.latent, self.size.latent)
        noise = comfy.sample.prepare_noise(latent, seed)

        def note(*_: object) -> None:
            times.append(self._now())

        callback = None if times is None else note
        settings = (steps, 4.0, "euler", "normal", self.positive, self.negative, latent)
        return comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=seed, callback=callback)

    def picture(self, seed: int) -> dict[str, float]:
        """Seconds of one picture's sampling and decoding."""
        start = self._now()
        latent = self.sample(self.model, self.steps, seed)
        sampled = self._now()
        if self.vae is not None:
            self.vae.decode(latent)
        return {"sampling_s": sampled - start, "decoding_s": self._now() - sampled}

    def _now(self) -> float:
        if not self.cpu:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()


def run(arguments: argparse.Namespace) -> dict[str, object]:
    import torch

    session = Session(arguments)
    with nullcontext() if arguments.cpu else PeakMemory() as peak:
        first = session.picture(1)
    session.sample(session.other, 1, 1)
    second = session.picture(2)
    # One more, step by step: what remains when loading and recording are over.
    times: list[float] = []
    session.sample(session.model, session.steps, 3, times)
    late = times[len(times) // 2 :]
    runner = getattr(getattr(session.model.model, "stepquant", None), "runner", None)
    return {
        "step_ms": 1000 * second["sampling_s"] / session.steps,
        "peak_gib": None if peak is None else peak.gpu_gib,
        "pictures": [first, second],
        "late_steps_ms": 1000 * (late[-1] - late[0]) / max(1, len(late) - 1),
        "class": type(session.model).__name__,
        "loaded_gib": session.model.loaded_size() / GIB,
        "runner": None if runner is None else runner.describe(),
        "allocator": None if arguments.cpu else torch.cuda.get_allocator_backend(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=("fp16", "int8"), required=True)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    arguments.source = arguments.source.resolve()
    dynamic = start_comfyui(dynamic=not arguments.cpu, cpu=arguments.cpu, default_allocator=True)
    if arguments.tiny:
        import speed_models

        speed_models.register_tiny()
    import torch

    with torch.inference_mode():  # as ComfyUI runs a prompt
        record = {"dynamic_vram": dynamic, **run(arguments)}
    sys.stdout.write("\n" + json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
