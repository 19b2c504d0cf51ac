"""Opens a safetensors file that carries one of our JSON headers. Every fault is one readable sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import FormatError


@contextmanager
def open_tensors(path: str | Path, key: str, newest: int, kind: str) -> Iterator[tuple[dict, safe_open]]:
    """Yield (header, safetensors handle) of a file whose metadata holds `key`.

    Args:
        newest: the newest header version this code reads.
        kind: what the file should be, with article, for messages.
    Raises: FormatError if the file is missing, truncated, of another kind or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file. Check the name and the folder.")
    try:
        with safe_open(str(path), framework="pt") as file:
            yield _parse(path, (file.metadata() or {}).get(key), newest, kind), file
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: the file is damaged or incomplete ({error}). Download or make it again.") from None


def _parse(path: Path, text: str | None, newest: int, kind: str) -> dict:
    if text is None:
        raise FormatError(f"{path}: this is not {kind}. Open it with the loader it was made for.")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    version = header.get("version") if isinstance(header, dict) else None
    if not isinstance(version, int):
        raise FormatError(f"{path}: the header of this file is damaged. Download or make it again.")
    if version > newest:
        raise FormatError(f"{path}: made by a newer StepQuant (format {version}; this one reads up to {newest}). Update StepQuant.")
    return header
