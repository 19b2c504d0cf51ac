"""`demo`: quantizes the shipped model before your eyes and shows what it costs and saves."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .atomic_write import make_folder, write_bytes
from .output import console, finite, print_json, progress_bar, size_text

LEGEND = """SQNR: of the UNet's output on fp16's own trajectory, mean over steps.
Peak memory: the UNet's weights and one picture's activations.
A CPU runs int8 for exactness, not for speed; a GPU's seconds differ."""


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for sheet.png, report.json and the quantized files; made if missing.")],
    prompts: Annotated[int, typer.Option(min=1, max=8, help="Pictures per format. Each takes about 15 seconds of a CPU.")] = 4,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampler steps. Usual is 20.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture; the others count up from it.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
) -> None:
    """Make pictures with the demo model in 16 bit and in int8, and compare them. Needs no GPU and no network."""
    from ..demo.run import draw_demo_sheet, run_demo
    from ..hosts.diffusers.trajectory import Sampling

    make_folder(out)
    with progress_bar(quiet=as_json) as start:
        result = run_demo(out, prompts, Sampling(steps, seed=seed), start)
    report = _report(result)
    picture = io.BytesIO()
    draw_demo_sheet(result).save(picture, "PNG", optimize=True)
    write_bytes(out / "sheet.png", picture.getvalue())
    write_bytes(out / "report.json", json.dumps(finite(report), indent=2).encode())
    if as_json:
        print_json(report)
        return
    console.print(_table(result))
    console.print(LEGEND, style="dim")
    console.print(f"Pictures side by side: [bold]{out / 'sheet.png'}[/]")


def _report(result) -> dict[str, object]:
    from ..demo.record import command_line, environment, quality_record
    from ..demo.run import MODEL_NAME

    sampling = result.reference.sampling
    formats = []
    for entry in result.formats:
        record = quality_record("demo", MODEL_NAME, entry.mode, entry.fidelity, entry.size_bytes, command_line())
        record["file"] = entry.file.name
        record["peak_bytes"] = entry.peak_bytes
        record["seconds_per_picture"] = round(entry.seconds, 3)
        if entry.fidelity is not None:
            record["step_sqnr_db"] = list(entry.fidelity.step_sqnr_db)
            record["picture_psnr_db"] = list(entry.fidelity.psnr_db)
        formats.append(record)
    return {
        "prompts": list(result.reference.prompts),
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "seed": sampling.seed,
        **environment(),
        "formats": formats,
    }


def _table(result) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("format", no_wrap=True, vertical="bottom")
    for title in (
        "UNet\nfile",
        "peak\nmemory",
        "s per\npicture",
        "PSNR\ndB",
        "SQNR\ndB",
        "worst\nstep dB",
        "latent\nSQNR dB",
        "integer\nshare",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for entry in result.formats:
        figures = [size_text(entry.size_bytes), size_text(entry.peak_bytes), f"{entry.seconds:.1f}"]
        if fidelity := entry.fidelity:
            decibels = (fidelity.mean_psnr_db, fidelity.sqnr_db, fidelity.sqnr_worst_db, fidelity.latent_sqnr_db)
            figures += [f"{value:.1f}" for value in decibels] + [f"{100 * fidelity.integer_share:.1f} %"]
        table.add_row(entry.title.partition(",")[0], *figures)
    return table
