"""`text-encoders`: an SDXL checkpoint in, its two text encoders in 8 bit out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import console, print_json, size_text
from .quantize import check_out


def text_encoders(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Whole SDXL checkpoint (.safetensors), 16 bit.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write (.safetensors), for models/text_encoders.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a checkpoint's text encoders with 8-bit weights, for the node Load text encoders."""
    from ..hosts.checkpoint_file import open_tensor_file
    from ..quant.text_encoder import from_checkpoint, quantize_text_encoders, write_text_encoders
    from ..version import VERSION

    with open_tensor_file(source) as file:
        check_out(source, out, overwrite)
        tensors = from_checkpoint(file)
        before = sum(tensor.nbytes for tensor in tensors.values())
        write_text_encoders(out, quantize_text_encoders(tensors, str(source)), VERSION)
    after = out.stat().st_size
    if as_json:
        print_json({"file": str(out), "size_bytes": after, "source_size_bytes": before})
        return
    console.print(f"{out}: two text encoders in ComfyUI's own int8, {size_text(before)} -> {size_text(after)}", soft_wrap=True)
