"""`quantize`: a checkpoint or UNet file in, a quantized file out; needs neither GPU nor engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CalibrationError, FormatError
from ..quant.recipe import DEFAULT_GROUPS, PRESETS
from .atomic_write import check_writable
from .open_model import DEMO
from .output import console, print_json, progress_bar, size_text


def quantize(
    source: Annotated[
        str, typer.Argument(metavar="IN", help=f"SDXL checkpoint or UNet (.safetensors), or '{DEMO}' for the demo model's UNet.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Quantized file to write (.safetensors).")],
    preset: Annotated[str, typer.Option(help=f"{' or '.join(PRESETS)}; the static one needs --calibration.")] = PRESETS[0],
    rounding: Annotated[
        str,
        typer.Option(help="Of 4-bit weights: plain, gptq (needs --hessians) or reconstruct (needs --blocks, --hessians too for the rest)."),
    ] = "plain",
    hessians: Annotated[Path | None, typer.Option(help="Folder made by `hessians` on this model.")] = None,
    blocks: Annotated[Path | None, typer.Option(help="Folder made by `reconstruct` on this model with this preset or recipe.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="File made by `calibrate` on this model.")] = None,
    bias_correction: Annotated[
        bool, typer.Option("--bias-correction", help="Fold the mean of what rounding changes into biases; needs --calibration.")
    ] = False,
    recipe: Annotated[Path | None, typer.Option(help="File made by `plan`; then --preset and --groups are not used.")] = None,
    groups: Annotated[int, typer.Option(min=1, max=64, help="Timestep groups of static scales. Usual is 8.")] = DEFAULT_GROUPS,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Quantize SDXL's UNet to 8 or 4 bit; text encoders and VAE of a whole checkpoint are copied as they are."""
    from ..hosts.quantize_file import quantize_file
    from ..quant.calibration import Calibration
    from ..quant.rounding.method import RoundingMethod

    how = _rounding(rounding, hessians, blocks)
    if how.method is RoundingMethod.GPTQ and not as_json:
        _say_cost(how, source_path(source))
    path = source_path(source)
    check_out(path, out, overwrite)
    chosen = preset if recipe is None else read_recipe(recipe)
    name = preset if recipe is None else chosen.preset
    if calibration is None and (preset == "w8a8-static" if recipe is None else chosen.needs_calibration):
        raise CalibrationError(f"{name}: needs --calibration FILE. Make one with `calibrate`, or use w8a8-token.")
    statistics = Calibration.load(calibration) if calibration else None
    with progress_bar(quiet=as_json) as start:
        model = quantize_file(path, out, chosen, groups, statistics, start("Quantizing layers"), how, bias_correction)
    before, after = path.stat().st_size, out.stat().st_size
    if as_json:
        print_json({"file": str(out), "preset": name, "layers": len(model.layers), "size_bytes": after, "source_size_bytes": before})
        return
    console.print(f"{out}: {name}, {len(model.layers)} layers, {size_text(before)} -> {size_text(after)}")


def _rounding(name: str, hessians: Path | None, blocks: Path | None):
    from ..quant.rounding.folder import RoundedFolder
    from ..quant.rounding.hessian import HessianFolder
    from ..quant.rounding.method import Rounding, rounding_method

    hessian = None if hessians is None else HessianFolder(hessians).read
    rounded = None if blocks is None else RoundedFolder(blocks).find
    return Rounding(rounding_method(name), hessian, rounded)  # says what the method lacks


def _say_cost(rounding, path: Path) -> None:
    from ..hosts.int4_cost import file_rounding_cost

    cost, seconds = file_rounding_cost(rounding.method, path)
    console.print(
        f"rounding {rounding.method.value}: about {max(1, round(seconds / 60))} min, up to {size_text(cost.peak_bytes)} of memory a layer",
        soft_wrap=True,
    )


def source_path(source: str) -> Path:
    """The file a command is to read: a path, or the demo model's UNet."""
    if source == DEMO:
        from ..demo.architecture import MODEL_DIR

        return MODEL_DIR / "unet.safetensors"
    return Path(source)


def read_recipe(path: Path):
    """The recipe in a file. Raises FormatError or SchemeError if it cannot be used."""
    from ..quant.recipe import Recipe

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: cannot read the recipe ({error}). Make one with `plan`.") from None
    return Recipe.from_json(data, str(path))


def check_out(source: Path, out: Path, overwrite: bool) -> None:
    """Raise FormatError if OUT is IN, exists, or cannot be written: before minutes of work."""
    if source.exists() and out.exists() and source.samefile(out):
        raise FormatError(f"{out}: is the file to be read. Give another name to write to.")
    if out.exists() and not overwrite:
        raise FormatError(f"{out}: exists already. Give another name, or --overwrite to replace it.")
    check_writable(out)
