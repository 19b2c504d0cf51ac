"""`export`: a quantized file in, a file for ComfyUI without StepQuant out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import console, print_json, size_text
from .quantize import check_out


def export(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Quantized model made by StepQuant (.safetensors).")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write (.safetensors).")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a quantized model in ComfyUI's own int8: Linears keep their codes, convolutions become 16 bit."""
    from ..quant.file_format import read_model
    from ..quant.native_format import write_native

    model = read_model(source)
    check_out(source, out, overwrite)
    write_native(out, model)
    before, after = source.stat().st_size, out.stat().st_size
    if as_json:
        print_json({"file": str(out), "size_bytes": after, "source_size_bytes": before})
        return
    console.print(f"{out}: ComfyUI's own int8, {size_text(before)} -> {size_text(after)}", soft_wrap=True)
