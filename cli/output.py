"""How commands speak: results on stdout, progress and errors on stderr, every foreseen fault as one sentence."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import StepQuantError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_WRITABLE = "Choose a folder that you may write to."
_FORESEEN = {
    errno.ENOSPC: "Free disk space or choose another folder.",
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.EROFS: _WRITABLE,
    errno.ENOENT: "Check the name and the folder; if it is a file of StepQuant itself, install it again.",
    errno.ENOTDIR: "Check the name and the folder.",
    errno.EISDIR: "Give a file, not a folder.",
}

console = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def one_sentence_errors(command: Callable) -> Callable:
    """Turn the faults a person can do something about into a sentence and an exit code, without traceback."""

    @functools.wraps(command)
    def wrapper(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except StepQuantError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            _fail("Stopped. Files that were finished stay; nothing half-written was left.", EXIT_INTERRUPTED)
        except ModuleNotFoundError as error:
            _fail(f'{error.name} is not installed. Run: pip install "stepquant[demo]"')
        except OSError as error:
            if error.errno not in _FORESEEN:
                raise
            _fail(f"{error.filename or 'disk'}: {error.strerror}. {_FORESEEN[error.errno]}")
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            _fail(f"not enough memory ({str(error).splitlines()[0]}). Close other programs, or use a smaller batch or model.")

    return wrapper


def _fail(sentence: str, code: int = EXIT_FAILED) -> None:
    stderr.print(f"[bold red]Error:[/] {_escape(sentence)}" if code == EXIT_FAILED else _escape(sentence), soft_wrap=True)
    raise typer.Exit(code)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def print_json(data: object) -> None:
    """One JSON document on stdout; infinite and undefined numbers become null, which JSON can hold."""
    typer.echo(json.dumps(finite(data), indent=2, ensure_ascii=False))


def finite(data):
    """A copy of nested data in which every number is one that JSON can hold."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return data


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Yields a function that opens a bar: bar = start("Sampling"); bar(done, total). Drawn on stderr, gone when done."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=36),
        TextColumn("{task.completed:>5}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, disable=quiet) as progress:

        def start(title: str) -> Callable[[int, int], None]:
            task = progress.add_task(title, total=None)

            def advance(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total, visible=done < total)

            return advance

        yield start


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What libraries print on the process's stdout goes to stderr meanwhile: HiGHS leaves debug lines, which are no JSON."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def size_text(size_bytes: float) -> str:
    """A size for people: 27.5 MB, 2.41 GB (powers of 1000, as file managers show)."""
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def decibel_text(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f} dB"
