"""Folders and small files of the command line, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from ..errors import FormatError
from ..quant.atomic_file import make_temporary, replaced_when_done


def write_bytes(path: Path, data: bytes) -> None:
    """Raises FormatError if the folder is missing or read-only, or the disk is full."""
    with replaced_when_done(path) as temporary:
        temporary.write_bytes(data)


def check_writable(path: Path) -> None:
    """Raise FormatError now if `path` could not be written later, so that nobody waits for minutes to be told."""
    make_temporary(path).unlink()


def make_folder(path: Path) -> None:
    """Raises FormatError if the folder neither exists nor can be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FormatError(f"{path}: cannot make this folder ({error.strerror}). Choose another one.") from None
