"""`plan`: a calibration and limits in, a recipe for every layer out, for `quantize --recipe`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import PlanError
from ..quant.plan_program import INTEGER_SHARE
from ..quant.recipe import DEFAULT_GROUPS
from ..quant.scheme import MAX_RANK
from .atomic_write import check_writable, write_bytes
from .open_model import DEMO
from .output import console, print_json, progress_bar, stdout_to_stderr
from .quantize import source_path

MEGABYTE = 1_000_000


def plan(
    source: Annotated[
        str, typer.Argument(metavar="IN", help=f"SDXL checkpoint or UNet (.safetensors), or '{DEMO}' for the demo model's UNet.")
    ],
    calibration: Annotated[Path, typer.Argument(help="File made by `calibrate --sensitivity` on this model.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Recipe to write (.json), for `quantize --recipe`.")],
    integer_share: Annotated[float, typer.Option(min=0, max=100, help="Least percent of multiply-adds in integers.")] = 100 * INTEGER_SHARE,
    max_size_mb: Annotated[float | None, typer.Option(min=0, help="Largest UNet file, in millions of bytes.")] = None,
    max_vram_mb: Annotated[float | None, typer.Option(min=0, help="Most memory for the UNet's weights, in millions of bytes.")] = None,
    min_sqnr_db: Annotated[
        float | None, typer.Option(help="The fastest plan that reaches this, instead of the best that fits; it may use 16-bit codes.")
    ] = None,
    grouping: Annotated[str, typer.Option(help="uniform, optimal, search or curve.")] = "optimal",
    groups: Annotated[
        int, typer.Option(min=1, max=64, help="Timestep groups of static scales, or coefficients of the curve.")
    ] = DEFAULT_GROUPS,
    shared: Annotated[bool, typer.Option("--shared", help="One division of the schedule for all layers instead of one each.")] = False,
    protect: Annotated[list[str] | None, typer.Option(help="Layer that stays 16 bit; * for any part. May be given again.")] = None,
    channel_groups: Annotated[int, typer.Option(min=1, max=16, help="Also offer channel groups, at most so many a layer.")] = 1,
    granularity: Annotated[
        int, typer.Option(help="Finest channels per block: 8, 16, 32, 64 or 128. Twice as many unless these are 2 dB better.")
    ] = 64,
    int4: Annotated[bool, typer.Option("--int4", help="Also offer 4-bit weights; give --max-size-mb, or none will be taken.")] = False,
    hessians: Annotated[
        Path | None, typer.Option(help="Folder made by `hessians --bits 8`, if `quantize` will round by it; takes as long as that.")
    ] = None,
    low_rank: Annotated[
        list[int] | None,
        typer.Option(min=1, max=MAX_RANK, help="Also offer 4-bit weights a 16-bit branch of this rank, where it pays: 16 or 32, or both."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Choose a number format for every layer: the best predicted quality within limits."""
    from ..hosts.checkpoint_file import open_checkpoint
    from ..quant.calibration import Calibration
    from ..quant.grouping import choose_groups
    from ..quant.layers import find_layers
    from ..quant.plan import make_plan, measure_options, unquantized_bytes
    from ..quant.plan_program import Budget
    from ..quant.recipe import preset_recipe
    from ..quant.rounding.hessian import HessianFolder
    from ..quant.rounding.method import Rounding, RoundingMethod

    if low_rank and not int4:
        raise PlanError("--low-rank: branches run beside 4-bit weights. Give --int4 too.")
    check_writable(out)
    folder = None if hessians is None else HessianFolder(hessians)
    moments = None if folder is None else folder.find
    rounding = Rounding() if moments is None else Rounding(RoundingMethod.GPTQ, moments)
    statistics = Calibration.load(calibration)
    budget = Budget(_bytes(max_size_mb), _bytes(max_vram_mb), min_sqnr_db, integer_share / 100)
    with open_checkpoint(source_path(source)) as file, progress_bar(quiet=as_json) as start:
        shapes = file.unet_shapes()
        layers = find_layers(shapes)
        if folder is not None and not any(map(folder.covers, layers)):
            raise PlanError(f"{hessians}: holds nothing of this model's layers. Run `hessians` first.")
        static = preset_recipe("w8a8-static", layers).schemes
        chosen = choose_groups(grouping, groups, statistics, static, shared, progress=start("Grouping timesteps"))
        options = measure_options(
            layers,
            lambda name: file[f"{file.unet_prefix}{name}.weight"],
            statistics,
            chosen,
            protect or (),
            channel_groups,
            granularity,
            start("Measuring layers"),
            rounding if int4 else None,
            moments,
            low_rank or (),
        )
    with stdout_to_stderr():
        made = make_plan(options, budget, chosen, unquantized_bytes(shapes, layers))
    write_bytes(out, json.dumps(made.recipe.to_json()).encode())
    if as_json:
        print_json(_report(made, out))
        return
    console.print("\n".join([*made.lines(), f"Recipe: {out}"]), soft_wrap=True)


def _bytes(megabytes: float | None) -> int | None:
    return None if megabytes is None else round(megabytes * MEGABYTE)


def _report(made, out: Path) -> dict[str, object]:
    return {
        "file": str(out),
        "sqnr_db": made.mean_db,
        "sqnr_by_bucket_db": dict(zip(made.buckets, made.sqnr_db, strict=True)),
        "integer_mac_share": made.integer_share,
        "wide_mac_share": made.wide_share,
        "size_bytes": made.size_bytes,
        "vram_bytes": made.vram_bytes,
        "kept_16_bit": made.kept_16_bit,
        "grouping": made.recipe.grouping,
        "layers": {
            name: {"choice": label, "sqnr_db": made.local_sqnr_db[name], "noise_share": made.noise_share[name]}
            for name, label in made.choices.items()
        },
    }
