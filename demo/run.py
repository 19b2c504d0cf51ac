"""The demo: the shipped model in 16 bit and quantized, same prompts and seeds, judged side by side. Prints nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor, nn

from ..hosts.checkpoint_file import sha256_of
from ..hosts.diffusers.calibrate import calibrate
from ..hosts.diffusers.fidelity import Fidelity, Reference, measure_fidelity, record_reference
from ..hosts.diffusers.hessians import hessians_observed
from ..hosts.diffusers.peak_memory import unet_peak_bytes
from ..hosts.diffusers.quantize import quantize_unet, unet_shapes
from ..hosts.diffusers.trajectory import Progress, Sampling
from ..hosts.diffusers.unet_file import save
from ..quant.calibration import Calibration
from ..quant.layers import find_layers
from ..quant.recipe import DEFAULT_GROUPS, preset_recipe
from ..quant.rounding.method import Rounding, RoundingMethod
from .architecture import MODEL_DIR
from .pipeline import load_demo_pipeline
from .prompts import CALIBRATION, SHOWN
from .sheet import Column, Row, draw_sheet

MODEL_NAME = "stepquant-demo-xs"
UNET_FILE = MODEL_DIR / "unet.safetensors"
TITLES = {
    "fp16": "fp16",
    "w8a8-token": "W8A8 token",
    "w8a8-static": f"W8A8 static, {DEFAULT_GROUPS} groups",
    "w4a8-mixed": "W4A8 mixed, GPTQ",
}
CALIBRATION_PROMPTS = 4
CALIBRATION_SEED = 10_000  # far from the shown pictures' seeds

StartProgress = Callable[[str], Progress]


@dataclass(frozen=True)
class FormatResult:
    """One line of the table. file: of the UNet. peak_bytes: UNet weights and activations of one call, in 16 bit.

    fidelity: None for the reference itself. seconds: sampling, per picture.
    """

    mode: str
    file: Path
    size_bytes: int
    peak_bytes: int
    seconds: float
    fidelity: Fidelity | None

    @property
    def title(self) -> str:
        return TITLES[self.mode]


@dataclass(frozen=True)
class DemoResult:
    """formats: fp16 first."""

    reference: Reference
    formats: tuple[FormatResult, ...]


def run_demo(out: Path, prompt_count: int, sampling: Sampling, start: StartProgress) -> DemoResult:
    """Sample and judge every format; the quantized UNets are written to `out`, which exists.

    Args:
        prompt_count: how many of SHOWN, 1 to 8.
        start: called with a title, returns the progress callback of that part.
    Raises: FormatError if `out` cannot be written.
    """
    pipeline = load_demo_pipeline()
    layers = find_layers(unet_shapes(pipeline.unet))
    base_model = {"name": MODEL_NAME, "sha256": sha256_of(UNET_FILE)}

    def quantized(mode: str, calibration: Calibration | None, rounding: Rounding | None = None) -> tuple[nn.Module, Path]:
        unet = quantize_unet(copy.deepcopy(pipeline.unet), preset_recipe(mode, layers), calibration, rounding)
        file = out / f"{MODEL_NAME}-{mode}.safetensors"
        save(unet, file, base_model)
        return unet, file

    # First what may fail on a full or read-only disk: nobody should wait a minute for that.
    candidates = {"w8a8-token": quantized("w8a8-token", None)}
    calibration_sampling = Sampling(sampling.steps, sampling.guidance, CALIBRATION_SEED)
    with hessians_observed(pipeline.unet) as hessian:
        calibration = calibrate(pipeline, CALIBRATION[:CALIBRATION_PROMPTS], calibration_sampling, progress=start("Calibrating"))
    candidates["w8a8-static"] = quantized("w8a8-static", calibration)
    candidates["w4a8-mixed"] = quantized("w4a8-mixed", None, Rounding(RoundingMethod.GPTQ, hessian))
    reference = record_reference(pipeline, SHOWN[:prompt_count], sampling, progress=start("fp16: sampling"))
    formats = [_reference_result(pipeline.unet, reference)]
    for mode, (unet, file) in candidates.items():
        fidelity = measure_fidelity(
            pipeline, unet, reference, start(f"{TITLES[mode]}: comparing steps"), start(f"{TITLES[mode]}: sampling")
        )
        peak = unet_peak_bytes(unet, reference.trajectory.calls[0])
        formats.append(FormatResult(mode, file, file.stat().st_size, peak, fidelity.seconds, fidelity))
    return DemoResult(reference, tuple(formats))


def _reference_result(unet: nn.Module, reference: Reference) -> FormatResult:
    peak = unet_peak_bytes(unet, reference.trajectory.calls[0])
    return FormatResult("fp16", UNET_FILE, UNET_FILE.stat().st_size, peak, reference.seconds, None)


def draw_demo_sheet(result: DemoResult) -> Image.Image:
    """Rows are prompts, columns are formats."""
    columns = [Column(entry.title, _column_figures(entry)) for entry in result.formats]
    pictures = [result.reference.pictures if entry.fidelity is None else entry.fidelity.pictures for entry in result.formats]
    rows = [
        Row(
            prompt,
            [to_image(column[index]) for column in pictures],
            ["" if entry.fidelity is None else f"PSNR {entry.fidelity.psnr_db[index]:.1f} dB" for entry in result.formats],
        )
        for index, prompt in enumerate(result.reference.prompts)
    ]
    sampling = result.reference.sampling
    subtitle = f"A small, really trained SDXL: same prompts, same seeds, {sampling.steps} steps. Linears and convolutions multiply in int8."
    footer = (
        "SQNR: signal-to-quantization-noise ratio of the UNet's output on fp16's own trajectory, mean over steps.",
        "PSNR: of the picture against fp16's. Figures of this small model rank formats; they do not predict full-size SDXL's.",
    )
    return draw_sheet("StepQuant demo", subtitle, columns, rows, footer)


def _column_figures(entry: FormatResult) -> str:
    size = f"{entry.size_bytes / 1e6:.1f} MB UNet"
    if entry.fidelity is None:
        return f"{size}, reference"
    return f"{size}, SQNR {entry.fidelity.sqnr_db:.1f} dB"


def to_image(picture: Tensor) -> Image.Image:
    """picture: (3, H, W) fp32 in [0, 1]."""
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())
