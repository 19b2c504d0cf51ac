"""Compare with original: same seeds, picture grid, figures and a plot per step. The work is in hosts/comfy/compare.py."""

from __future__ import annotations

from comfy_api.latest import io
from PIL import Image, ImageChops

from .line_plot import Series, draw_line_plot
from .picture_grid import Row, draw_picture_grid
from .preview import show, to_picture, to_tensor
from .quantize import CATEGORY
from .report import finite_steps, named_layers, scheme_counts, with_report
from .sampler_inputs import conditioning_inputs, sampling_inputs

MOST_ROWS = 8
DIFFERENCE_GAIN = 4


class StepQuantCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StepQuantCompare",
            display_name="Compare with original (StepQuant)",
            category=CATEGORY,
            description="Makes the same pictures with the original and the quantized model, and measures the difference at every step.",
            search_aliases=["quality", "SQNR", "PSNR", "A/B test", "difference", "benchmark"],
            inputs=[
                io.Model.Input("original", tooltip="The 16-bit model, as connected to Quantize SDXL."),
                io.Model.Input("quantized", tooltip="The model from Quantize SDXL or Load quantized, with the same LoRAs and patches."),
                io.Vae.Input("vae", tooltip="Decodes the pictures of both."),
                *conditioning_inputs(),
                *sampling_inputs(),
                io.Int.Input(
                    "runs",
                    default=2,
                    min=1,
                    max=64,
                    tooltip="How many seeds are compared. Each takes three samplings; the grid shows the first 8 pictures. Usually 2 to 8.",
                ),
            ],
            outputs=[
                io.Image.Output("grid", display_name="grid", tooltip="Original, quantized and difference side by side, with the figures."),
                io.Image.Output("plot", display_name="plot", tooltip="SQNR of the UNet's output at each step."),
                io.Image.Output("original_images", display_name="original images", tooltip="The original's pictures at full size."),
                io.Image.Output("quantized_images", display_name="quantized images", tooltip="The quantized model's, in the same order."),
                io.String.Output("report", display_name="report", tooltip="The figures as text."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        original,
        quantized,
        vae,
        positive,
        negative,
        latent_image,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float = 1.0,
        runs: int = 2,
    ) -> io.NodeOutput:
        from ..hosts.comfy.attach import state_of
        from ..hosts.comfy.compare import compare_models
        from ..hosts.comfy.sampling import SamplerSettings

        settings = SamplerSettings(steps, cfg, sampler_name, scheduler, denoise)
        result = compare_models(original, quantized, vae, positive, negative, latent_image, seed, settings, runs)
        report = "\n".join(result.lines())
        state = state_of(quantized)
        name = "quantized" if state is None else state.recipe.preset
        grid, plot = to_tensor(_draw_grid(result, name)), to_tensor(_draw_plot(result, name))
        shown = show(cls, report, [grid, plot, result.original[:1], result.quantized[:1]])
        *previews, before, after = shown["images"]
        full = _full_report(result, state, {"before": before, "after": after})
        return io.NodeOutput(grid, plot, result.original, result.quantized, report, ui=with_report({**shown, "images": previews}, full))


def _full_report(result, state, pictures: dict[str, dict]) -> dict[str, object]:
    """For the panel: the figures, the SQNR of every step, layers that did not run as integers, a picture pair for the slider."""
    return {
        "title": "quantized against original" if state is None else f"{state.recipe.preset} against the original",
        "figures": result.lines(),
        "schemes": [] if state is None else scheme_counts(state.recipe),
        "layers": named_layers(result.float_layers, "ran in floating point in the last run"),
        "steps_db": finite_steps(result.step_sqnr.per_step_db()),
        "pictures": pictures,
    }


def _draw_grid(result, name: str) -> Image.Image:
    rows = []
    for index, (seed, psnr) in enumerate(zip(result.seeds[:MOST_ROWS], result.psnr_db, strict=False)):
        pair = [to_picture(result.original[index]), to_picture(result.quantized[index])]
        number = result.seeds[: index + 1].count(seed)
        label = f"seed {seed}" if result.seeds.count(seed) == 1 else f"seed {seed}, no. {number} of the batch"
        rows.append(Row(f"{label}, PSNR {psnr:.1f} dB", [*pair, _difference(*pair)]))
    return draw_picture_grid(["original", name, f"difference x {DIFFERENCE_GAIN}"], rows, result.lines())


def _difference(first: Image.Image, second: Image.Image) -> Image.Image:
    return ImageChops.difference(first, second).point(lambda value: min(255, DIFFERENCE_GAIN * value))


def _draw_plot(result, name: str) -> Image.Image:
    series = [Series(name, result.step_sqnr.per_step_db())]
    return draw_line_plot("UNet output against the original, on its trajectory", "SQNR in dB, higher is better", series)


NODES = [StepQuantCompare]
