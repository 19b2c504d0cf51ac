"""What 4 bits would cost the demo model's convolutions: noise of their weights alone in the UNet's output, on fp16's own trajectory.

    python int4_convs.py [--steps 8] [--rows 400]

Groups of 64 run along (tap, input channel); rounded plainly, and by GPTQ on unfolded inputs of other prompts. For each set of
convolutions: SQNR, what a model of 37.4 dB (best W4A8) would lose, and what SDXL's file would gain. Nothing else is quantized.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepquant.demo.pipeline import load_demo_pipeline
from stepquant.quant.int4 import quantize_int4
from stepquant.quant.rounding.gptq import gptq_int4

BEST_W4A8_DB = 37.4
CALIBRATION = ("red fox, white", "two green apples, blue", "dog and a hat, pink", "yellow car, gray")
HELD_OUT = ("purple cat, yellow", "airplane, green", "three blue balls, white", "house, red")
# Sets by the beginnings of diffusers' names, and MiB of SDXL's int8 codes in them.
SETS = {
    "middle block": (("mid_block",), 56.2),
    "encoder's deepest": (("down_blocks.2",), 49.2),
    "both": (("mid_block", "down_blocks.2"), 105.5),
    "decoder's deepest, 3x3": (("up_blocks.0.resnets.0.conv1", "up_blocks.0.resnets.0.conv2", "up_blocks.0.resnets.1.conv1",
                                "up_blocks.0.resnets.1.conv2", "up_blocks.0.resnets.2.conv1", "up_blocks.0.resnets.2.conv2"), 119.5),
    "all but the first and last": (("",), 317.7),
}  # fmt: skip
INT4_SHARE = 1 - (4 + 8 / 64) / 8  # of int8 codes that 4-bit ones and their group scales do without


def flat(weight: Tensor) -> Tensor:
    """(N, C, kh, kw) -> (N, kh * kw * C)."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def image(rows: Tensor, like: Tensor) -> Tensor:
    N, C, kh, kw = like.shape
    return rows.view(N, kh, kw, C).permute(0, 3, 1, 2).contiguous()


class Convs:
    def __init__(self, steps: int, rows: int) -> None:
        self._pipeline = load_demo_pipeline()
        self._pipeline.set_progress_bar_config(disable=True)
        self.unet, self._steps, self._rows = self._pipeline.unet, steps, rows
        modules = self.unet.named_modules()
        self.found = {name: each for name, each in modules if isinstance(each, nn.Conv2d) and name not in ("conv_in", "conv_out")}
        self.weights = {name: conv.weight.data.clone() for name, conv in self.found.items()}
        self._generator = torch.Generator().manual_seed(3)
        calibration, self._calls = self._record(CALIBRATION, 1), self._record(HELD_OUT, 2)
        hessians = self._hessians(calibration)
        self.rounded = {way: {} for way in ("plain", "GPTQ")}
        for name, weight in self.weights.items():
            for way, int4 in (("plain", quantize_int4(flat(weight), name)), ("GPTQ", gptq_int4(flat(weight), hessians[name], name))):
                self.rounded[way][name] = image(int4.dequantize(), weight)

    def sqnr_db(self, names: list[str], way: str) -> float:
        """Of the UNet's output with these convolutions rounded."""
        for name in names:
            self.found[name].weight.data = self.rounded[way][name]
        noise = signal = 0.0
        with torch.no_grad():
            for args, kwargs, wanted in self._calls:
                noise += float((self._output(self.unet(*args, **kwargs)) - wanted).double().square().sum())
                signal += float(wanted.double().square().sum())
        for name in names:
            self.found[name].weight.data = self.weights[name]
        return 10 * math.log10(signal / noise)

    @staticmethod
    def _output(result: object) -> Tensor:
        return result[0] if isinstance(result, tuple) else result.sample

    def _record(self, scenes: tuple[str, ...], seed: int) -> list[tuple]:
        calls: list[tuple] = []
        hook = self.unet.register_forward_hook(
            lambda _, args, kwargs, result: calls.append((args, kwargs, self._output(result))), with_kwargs=True
        )
        prompts = [f"flat icon of a {scene} background" for scene in scenes]
        generator = torch.Generator().manual_seed(seed)
        self._pipeline(prompts, num_inference_steps=self._steps, guidance_scale=4.0, generator=generator, output_type="latent")
        hook.remove()
        return calls

    def _hessians(self, calls: list[tuple]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}

        def watch(name: str, conv: nn.Conv2d):
            def before(_: nn.Module, args: tuple[Tensor]) -> None:
                patches = functional.unfold(args[0], conv.kernel_size, padding=conv.padding, stride=conv.stride)
                patches = patches.unflatten(1, (args[0].shape[1], -1)).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)  # (pixels, taps * C)
                rows = patches[torch.randint(len(patches), (self._rows,), generator=self._generator)]
                sums[name] = sums.get(name, 0) + rows.t() @ rows

            return before

        hooks = [conv.register_forward_pre_hook(watch(name, conv)) for name, conv in self.found.items()]
        with torch.no_grad():
            for args, kwargs, _ in calls:
                self.unet(*args, **kwargs)
        for hook in hooks:
            hook.remove()
        return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=400, help="unfolded pixels of each call that GPTQ sees")
    arguments = parser.parse_args()
    convs = Convs(arguments.steps, arguments.rows)
    sys.stdout.write("convolutions | SQNR plain, GPTQ (dB) | loss at 37.4 dB plain, GPTQ (dB) | SDXL's file smaller by (MiB)\n")
    for label, (beginnings, mib) in SETS.items():
        names = [name for name in convs.found if name.startswith(beginnings)]
        found = [convs.sqnr_db(names, way) for way in ("plain", "GPTQ")]
        losses = [10 * math.log10(1 + 10 ** ((BEST_W4A8_DB - db) / 10)) for db in found]
        shown = " | ".join(", ".join(f"{value:.2f}" for value in values) for values in (found, losses))
        sys.stdout.write(f"{label} ({len(names)}) | {shown} | {mib * INT4_SHARE:.0f}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
