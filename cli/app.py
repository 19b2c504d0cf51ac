"""Gathers the commands. Each command's module imports torch and the engine only when the command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from ..version import VERSION
from . import (
    calibrate,
    check,
    compare,
    corrections,
    demo,
    export,
    hessians,
    inspect,
    plan,
    quantize,
    quest,
    reconstruct,
    text_encoders,
    tune,
)
from .output import one_sentence_errors

app = typer.Typer(
    help="StepQuant: quantized SDXL. Results go to stdout, progress to stderr; the exit code is 0 or an error says why.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (
    demo.demo,
    quantize.quantize,
    calibrate.calibrate,
    plan.plan,
    hessians.hessians,
    reconstruct.reconstruct,
    quest.quest,
    export.export,
    text_encoders.text_encoders,
    inspect.inspect,
    tune.tune,
    corrections.corrections,
    compare.compare,
    check.check,
):
    app.command()(one_sentence_errors(command))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(VERSION)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")] = False,
) -> None:
    pass
