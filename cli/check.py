"""`check`: which kernels will run on this machine, why, and what to do if they are not the fast ones."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from .output import console, print_json


def check(as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False) -> None:
    """Show GPU, torch and Triton, and which kernels will run."""
    from ..kernels.describe import describe

    report = describe()
    if as_json:
        print_json(report)
        return
    table = Table("device", "name", "memory", "kernels", "why", box=None, header_style="bold", pad_edge=False)
    for device in report["devices"]:
        memory = f"{device['memory_gib']} GiB" if device["memory_gib"] else ""
        table.add_row(device["device"], device["name"], memory, device["backend"], device["reason"])
    console.print(table)
    console.print(f"torch {report['torch']}, Triton {report['triton'] or 'not installed'}, CUDA {report['cuda'] or 'not in this torch'}")
    for device in report["devices"]:
        if device["remedy"]:
            console.print(f"{device['device']}: {device['remedy']}", style="yellow")
