"""Writes a small file so that a cancel or a full disk leaves the old one or the new one, never a part. Big files: quant/atomic_file.py."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import FormatError


def write_bytes(path: Path, data: bytes) -> None:
    """Raises FormatError if the folder is missing or read-only, or the disk is full."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except OSError as error:
        raise FormatError(f"{path}: cannot write ({error.strerror}). Choose a folder with free space that you may write to.") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise FormatError now if `path` could not be written later, so that nobody waits for minutes to be told."""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise FormatError(f"{path}: cannot write here ({error.strerror}). Choose a folder that exists and that you may write to.") from None
    os.close(handle)
    Path(temporary).unlink()


def make_folder(path: Path) -> None:
    """Raises FormatError if the folder neither exists nor can be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FormatError(f"{path}: cannot make this folder ({error.strerror}). Choose another one.") from None
