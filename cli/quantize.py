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
        typer.Option(help="plain, gptq (needs --hessians), or of 4 bits reconstruct or quest (need --blocks; --hessians for the rest)."),
    ] = "plain",
    hessians: Annotated[
        Path | None, typer.Option(help="Folder made by `hessians` on this model; of 8-bit weights by `hessians --bits 8`.")
    ] = None,
    blocks: Annotated[
        Path | None, typer.Option(help="Folder made by `reconstruct` or `quest` on this model with this preset or recipe.")
    ] = None,
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

    how = read_rounding(rounding, hessians, blocks)
    path = source_path(source)
    check_out(path, out, overwrite)
    chosen = preset if recipe is None else read_recipe(recipe)
    moments = _moments(how, hessians, path, chosen, quiet=as_json)
    if recipe is not None and not as_json:
        _say_branches(path, chosen)
    name = preset if recipe is None else chosen.preset
    if calibration is None and (preset == "w8a8-static" if recipe is None else chosen.needs_calibration):
        raise CalibrationError(f"{name}: needs --calibration FILE. Make one with `calibrate`, or use w8a8-token.")
    statistics = Calibration.load(calibration) if calibration else None
    with progress_bar(quiet=as_json) as start:
        model = quantize_file(path, out, chosen, groups, statistics, start("Quantizing layers"), how, bias_correction, moments)
    before, after = path.stat().st_size, out.stat().st_size
    if as_json:
        print_json({"file": str(out), "preset": name, "layers": len(model.layers), "size_bytes": after, "source_size_bytes": before})
        return
    console.print(f"{out}: {name}, {len(model.layers)} layers, {size_text(before)} -> {size_text(after)}")


def _say_branches(path: Path, recipe) -> None:
    """The file's size, before the work, where some of it is branches."""
    from ..hosts.checkpoint_file import open_checkpoint
    from ..quant.layer_noise import stored_bytes
    from ..quant.layers import find_layers
    from ..quant.low_rank import low_rank_bytes
    from ..quant.plan import unquantized_bytes

    ranks = {name: scheme.rank for name, scheme in recipe.schemes.items() if scheme.rank}
    if not ranks:
        return
    with open_checkpoint(path) as file:
        shapes = file.unet_shapes()
    layers = find_layers(shapes)
    branches = sum(low_rank_bytes(layers[name].shape, rank) for name, rank in ranks.items() if name in layers)
    whole = unquantized_bytes(shapes, layers) + sum(stored_bytes(spec, recipe.schemes.get(name)) for name, spec in layers.items())
    layers_text = "1 layer" if len(ranks) == 1 else f"{len(ranks)} layers"
    console.print(f"branches beside {layers_text}: {size_text(branches)} of the UNet's {size_text(whole)}", soft_wrap=True)


def read_rounding(name: str, hessians: Path | None, blocks: Path | None):
    """How 4-bit weights are rounded. Raises SchemeError or CalibrationError if the method is unknown or lacks something."""
    from ..quant.rounding.folder import RoundedFolder
    from ..quant.rounding.hessian import HessianFolder
    from ..quant.rounding.method import Rounding, rounding_method

    hessian = None if hessians is None else HessianFolder(hessians).read
    rounded = None if blocks is None else RoundedFolder(blocks).find
    return Rounding(rounding_method(name), hessian, rounded)  # says what the method lacks


def _moments(rounding, hessians: Path | None, path: Path, chosen, quiet: bool):
    """What 8-bit weights are rounded by, or None; says what rounding will take. Raises CalibrationError if there is nothing to go by."""
    from ..hosts.rounding_cost import file_rounding
    from ..quant.rounding.hessian import HessianFolder
    from ..quant.rounding.method import RoundingMethod

    if rounding.method is RoundingMethod.PLAIN or hessians is None:
        return None
    folder = HessianFolder(hessians)
    found = file_rounding(rounding.method, path, chosen, folder.covers)
    if not found.int4 and not found.int8_gptq:
        raise CalibrationError(f"{hessians}: holds nothing for this model's 8-bit weights. Run `hessians --bits 8` first.")
    if not quiet:
        text = f"rounding {rounding.method.value}: about {max(1, round(found.seconds / 60))} min, "
        text += f"up to {size_text(found.cost.peak_bytes)} of memory a layer"
        if found.int8:
            text += f"; of 8-bit weights {found.int8_gptq} of {found.int8} layers, the others plainly"
        console.print(text, soft_wrap=True)
    return folder.find


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
