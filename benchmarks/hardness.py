"""How hard the demo model's and the hard variant's layers are, by MixDQ's own protocol, beside SDXL-Turbo's published figures.

    python benchmarks/hardness.py [--prompts 1] [--device cpu] [--out benchmarks/results]

SQNR of the UNet's output in its first step with one layer quantized at a time: its input to 8 or 4 bits with one static min-max
range, or its weight to 8 bits per output channel. One JSON line per model and kind of layer is appended to hardness.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from stepquant.demo.hard_match import PROPAGATION_DB, SDXL_HARDNESS_DB, first_calls, layer_hardness, layer_inputs
from stepquant.demo.hard_variant import harden, read_factors
from stepquant.demo.pipeline import load_demo_pipeline
from stepquant.demo.record import command_line, environment, quality_record
from stepquant.demo.run import MODEL_NAME
from stepquant.hosts.diffusers.trajectory import Trajectory, UNetCall, replay
from stepquant.quant.calibration import quantized_values, static_range
from stepquant.quant.sqnr import StepSqnr
from stepquant.quant.weight import dequantize_weight, quantize_weight


def main() -> None:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    # fp32, and no TF32, whose rounding is a floor at 79 dB: what is compared reaches 100 dB.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipeline = load_demo_pipeline(device=args.device)
    calls = first_calls(pipeline, args.prompts)
    with (args.out / "hardness.jsonl").open("a", encoding="utf-8") as file:
        for model, unet in ((MODEL_NAME, pipeline.unet), (f"{MODEL_NAME}-hard", harden(pipeline.unet, read_factors()))):
            for record in _records(model, unet, calls, args):
                file.write(json.dumps(record) + "\n")
                say = "{kind_of_layer:16s} {model}: {hardness_db:5.1f} dB, SDXL-Turbo {sdxl_turbo_db:5.1f}"
                print(say.format(**record), file=sys.stderr)  # noqa: T201


def _records(model: str, unet: nn.Module, calls: Sequence[UNetCall], args: argparse.Namespace) -> list[dict[str, object]]:
    inputs = layer_inputs(unet, calls)
    local = layer_hardness(unet, inputs)
    names = list(inputs)
    figures = {
        "act_sqnr_8": {name: _with_input(unet, calls, name, inputs[name], 8) for name in names},
        "act_sqnr_4": {name: _with_input(unet, calls, name, inputs[name], 4) for name in names},
        "weight_sqnr_8": {name: _with_weight(unet, calls, name) for name in names},
    }
    records = []
    for kind, quantiles in SDXL_HARDNESS_DB.items():
        own = [name for name in names if name.endswith(f".{kind}")]
        hardness = [figures["weight_sqnr_8"][name] - figures["act_sqnr_8"][name] for name in own]
        record = quality_record("hardness", model, "one layer at a time", None, 0, command_line())
        record["commit"] = record["commit"] or os.environ.get("STEPQUANT_COMMIT")
        record |= {"kind_of_layer": kind, "layers": len(own), "hardness_db": round(median(hardness), 2), "sdxl_turbo_db": quantiles[2]}
        record |= {name: round(median(values[layer] for layer in own), 2) for name, values in figures.items()}
        # What PROPAGATION_DB of hard_match.py was taken from, on the demo model.
        offsets = [value - local[name] for value, name in zip(hardness, own, strict=True)]
        record |= {"propagation_db": round(median(offsets), 2), "assumed_propagation_db": PROPAGATION_DB[kind]}
        records.append(record | {"prompts": args.prompts} | environment())
    return records


def _with_input(unet: nn.Module, calls: Sequence[UNetCall], name: str, x: Tensor, bits: int) -> float:
    scale, zero_point = static_range(float(x.min()), float(x.max()), symmetric=False, bits=bits)

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (quantized_values(args[0], scale, zero_point, False, bits), *args[1:])

    handle = unet.get_submodule(name).register_forward_pre_hook(before)
    try:
        return _output_sqnr(unet, calls)
    finally:
        handle.remove()


def _with_weight(unet: nn.Module, calls: Sequence[UNetCall], name: str) -> float:
    layer = unet.get_submodule(name)
    weight, codes = layer.weight, quantize_weight(layer.weight, name)
    layer.weight = nn.Parameter(dequantize_weight(codes.codes, codes.scale, weight.dtype), requires_grad=False)
    try:
        return _output_sqnr(unet, calls)
    finally:
        layer.weight = weight


def _output_sqnr(unet: nn.Module, calls: Sequence[UNetCall]) -> float:
    meter = StepSqnr()
    for call, answer in replay(unet, Trajectory(list(calls))):
        meter.add(0, call.output, answer)
    return meter.mean_db()


if __name__ == "__main__":
    main()
