"""`compare`: two models on the same seeds, as a picture sheet and numbers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..errors import FormatError
from .atomic_write import check_writable, write_bytes
from .calibrate import read_prompts
from .open_model import DEMO, choose_device, open_candidate, open_pipeline
from .output import console, decibel_text, print_json, progress_bar


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help=f"The reference: an SDXL checkpoint, or '{DEMO}'.")],
    second: Annotated[
        str, typer.Argument(metavar="B", help="The model to judge: a quantized UNet or checkpoint, or another SDXL checkpoint.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Picture sheet to write (.png).")] = Path("compare.png"),
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many of the prompts to use.")] = 4,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampler steps. Usual is 20.")] = 20,
    guidance: Annotated[float, typer.Option(min=1.0, help="Classifier-free guidance scale.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Sample A and B from the same seeds; print how far B is from A and draw both side by side."""
    from ..demo.prompts import SHOWN
    from ..hosts.diffusers.fidelity import measure_fidelity, record_reference
    from ..hosts.diffusers.trajectory import Sampling

    if out.suffix.lower() != ".png":
        raise FormatError(f"{out}: the sheet is a PNG. Give a name that ends in .png.")
    check_writable(out)
    texts = read_prompts(prompts, SHOWN)[:count]
    pipeline = open_pipeline(first, choose_device(device))
    candidate = open_candidate(second, pipeline)
    with progress_bar(quiet=as_json) as start:
        reference = record_reference(pipeline, texts, Sampling(steps, guidance, seed), progress=start("A: sampling"))
        fidelity = measure_fidelity(pipeline, candidate, reference, start("B: comparing steps"), start("B: sampling"))
    names = _short_names(first, second)
    sheet = io.BytesIO()
    _draw(names, reference, fidelity).save(sheet, "PNG", optimize=True)
    write_bytes(out, sheet.getvalue())
    if as_json:
        print_json(_report(first, second, reference, fidelity, out))
        return
    _print(names[1], fidelity, out)


def _draw(names: tuple[str, str], reference, fidelity):
    from ..demo.run import to_image
    from ..demo.sheet import Column, Row, draw_sheet

    columns = [Column(names[0], "reference"), Column(names[1], f"SQNR {decibel_text(fidelity.sqnr_db)}")]
    rows = [
        Row(prompt, [to_image(reference.pictures[i]), to_image(fidelity.pictures[i])], ["", f"PSNR {decibel_text(fidelity.psnr_db[i])}"])
        for i, prompt in enumerate(reference.prompts)
    ]
    subtitle = f"Same prompts, same seeds, {reference.sampling.steps} steps."
    return draw_sheet("StepQuant compare", subtitle, columns, rows)


def _report(first: str, second: str, reference, fidelity, out: Path) -> dict[str, object]:
    return {
        "a": first,
        "b": second,
        "prompts": list(reference.prompts),
        "steps": reference.sampling.steps,
        "seed": reference.sampling.seed,
        "sqnr_db": fidelity.sqnr_db,
        "sqnr_worst_db": fidelity.sqnr_worst_db,
        "step_sqnr_db": list(fidelity.step_sqnr_db),
        "latent_sqnr_db": fidelity.latent_sqnr_db,
        "psnr_db": fidelity.mean_psnr_db,
        "picture_psnr_db": list(fidelity.psnr_db),
        "integer_mac_share": fidelity.integer_share,
        "seconds_per_picture": {"a": reference.seconds, "b": fidelity.seconds},
        "sheet": str(out),
    }


def _print(name: str, fidelity, out: Path) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("UNet output SQNR", f"{decibel_text(fidelity.sqnr_db)}, worst step {decibel_text(fidelity.sqnr_worst_db)}")
    table.add_row("final latent SQNR", decibel_text(fidelity.latent_sqnr_db))
    table.add_row("PSNR of the pictures", decibel_text(fidelity.mean_psnr_db))
    table.add_row(f"integer multiply-adds of {name}", f"{100 * fidelity.integer_share:.1f} %")
    console.print(table)
    console.print(f"Pictures side by side: [bold]{out}[/]")


def _short_names(first: str, second: str) -> tuple[str, str]:
    names = tuple(Path(name).stem[:24] for name in (first, second))
    return names if names[0] != names[1] else (f"A: {names[0]}", f"B: {names[1]}")
