"""`tune`: trains a scale LoRA for a quantized file, on pictures (a new subject) or on what the 16-bit model answers (repair)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CalibrationError, FormatError
from .atomic_write import check_writable
from .calibrate import read_prompts
from .open_model import DEMO, choose_device, open_candidate, open_pipeline
from .output import console, print_json, progress_bar, size_text

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
RECORDED_STEPS = 20


def tune(
    base: Annotated[str, typer.Argument(help=f"The 16-bit SDXL checkpoint (.safetensors), or '{DEMO}' for the demo model.")],
    quantized: Annotated[str, typer.Argument(help="The quantized file whose scales are tuned, made from BASE.")],
    out: Annotated[Path, typer.Argument(help="Scale LoRA to write (.safetensors).")],
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures to learn, each with a .txt of its prompt beside it. Left out: repair."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="Prompt of pictures that have no .txt beside them.")] = "",
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line, of what is repaired, or is to stay as it is.")] = None,
    steps: Annotated[int, typer.Option(min=1, max=100_000, help="Training steps. Usual is 200 to 400.")] = 300,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Of the scales' logarithms. Usual is 0.01, 0.001 for repair.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in one step.")] = 4,
    experts: Annotated[int, typer.Option(help="Scale sets along the schedule: 1, 2 or 4. Usual is 1.")] = 1,
    prior_weight: Annotated[float, typer.Option(min=0.0, help="How much of all else is to stay as it is; 0 leaves it out.")] = 1.0,
    guidance: Annotated[float, typer.Option(min=1.0, help="Classifier-free guidance scale of the recorded sampling.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise and of the recorded pictures.")] = 0,
    exact: Annotated[bool, typer.Option("--exact", help="Train with rounded activations: half as fast.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped; it left OUT.state.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train nothing but the scales of a quantized model: a file of a few MB, for the node Load scale LoRA."""
    from ..demo.prompts import CALIBRATION
    from ..hosts.diffusers.trajectory import Sampling, record_trajectory
    from ..hosts.diffusers.tune import encode_examples
    from ..hosts.diffusers.tune import tune as run
    from ..quant.tuning.scale_file import save_scale_set
    from ..quant.tuning.training import REPAIR_RATE, SUBJECT_RATE, TuningSettings, load_state
    from ..version import VERSION

    check_writable(out)
    pictures = None if images is None else _pictures(images, prompt)
    rate = learning_rate or (REPAIR_RATE if pictures is None else SUBJECT_RATE)
    settings = TuningSettings(steps, rate, batch, experts, prior_weight, seed)
    state_file = out.with_name(out.name + ".state")
    before = load_state(state_file) if resume else None
    texts = read_prompts(prompts, CALIBRATION)
    pipeline = open_pipeline(base, choose_device(device))
    unet = open_candidate(quantized, pipeline)
    with progress_bar(quiet=as_json) as start:
        examples = None if pictures is None else encode_examples(pipeline, _read(pictures, _side(pipeline)), [text for _, text in pictures])
        reference = None
        if examples is None or prior_weight > 0:
            reference = record_trajectory(pipeline, texts, Sampling(RECORDED_STEPS, guidance, seed), 1, start("Recording answers to keep"))
        bar, losses = start("Tuning scales"), []

        def progress(done: int, total: int, loss: float) -> None:
            losses.append(loss)
            bar(done, total)

        scales = run(pipeline, unet, examples, reference, settings, before, progress, lambda state: state.save(state_file), exact)
    save_scale_set(scales, out, VERSION)
    state_file.unlink(missing_ok=True)
    size = out.stat().st_size
    if as_json:
        print_json(
            {"file": str(out), "size_bytes": size, "scales": scales.values, "loss": losses[-1] if losses else None, **scales.summary}
        )
        return
    console.print(
        f"{out}: {scales.values} scales, {size_text(size)}, {size / Path(quantized).stat().st_size:.2%} of {Path(quantized).name}"
    )


def _pictures(folder: Path, prompt: str) -> list[tuple[Path, str]]:
    """(file, prompt) of every picture. Raises CalibrationError if there are none, or one has no prompt."""
    if not folder.is_dir():
        raise CalibrationError(f"{folder}: no such folder. Give the folder that holds the pictures.")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURE_ENDINGS)
    if not files:
        raise CalibrationError(f"{folder}: holds no pictures ({', '.join(PICTURE_ENDINGS)}). Usual is 4 to 10 of the subject.")
    found = [(file, _prompt_of(file) or prompt.strip()) for file in files]
    bare = next((file for file, text in found if not text), None)
    if bare is not None:
        raise CalibrationError(f"{bare}: no prompt. Write one into {bare.with_suffix('.txt').name}, or give --prompt for all.")
    return found


def _prompt_of(file: Path) -> str:
    text = file.with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8").strip() if text.is_file() else ""
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{text}: cannot read the prompt ({error}). Save it as UTF-8.") from None


def _side(pipeline) -> int:
    """Of the square pictures that the model was made for, in pixels."""
    return pipeline.unet.config.sample_size * pipeline.vae_scale_factor


def _read(pictures: Sequence[tuple[Path, str]], side: int):
    """(P, 3, side, side) fp32 in [0, 1]: the middle square, on white where a picture is transparent."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    found = []
    for file, _ in pictures:
        try:
            with Image.open(file) as opened:
                picture = ImageOps.exif_transpose(opened).convert("RGBA")
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise FormatError(f"{file}: cannot read the picture ({error}). Save it again as PNG.") from None
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        pixels = np.asarray(ImageOps.fit(picture, (side, side), Image.LANCZOS), dtype=np.float32) / 255
        found.append(torch.from_numpy(pixels).permute(2, 0, 1))
    return torch.stack(found)
