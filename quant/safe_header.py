"""Opens a safetensors file that carries one of our JSON headers. Every fault is one readable sentence, hostile ones included.

Checked before anything is read or allocated by a header's word: how long the header is, and every tensor's shape. Names in a
file are never used as paths; texts from a header are shown, so they are cut to what can be printed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import FormatError

# SDXL's 2500 tensors and the recipe of 794 layers take under 1 MB; safetensors itself would parse 100 MB, for minutes.
LARGEST_HEADER_BYTES = 16 << 20
LENGTH_BYTES = 8  # little-endian, before the JSON
# The widest of SDXL's dimensions is 49408, the text encoders' vocabulary. A tensor without elements may claim any.
LARGEST_DIMENSION = 1 << 24
LONGEST_TEXT = 200


@contextmanager
def open_tensors(path: str | Path, key: str, newest: int, kind: str) -> Iterator[tuple[dict, safe_open]]:
    """Yield (header, safetensors handle) of a file whose metadata holds `key`.

    Args:
        newest: the newest header version this code reads.
        kind: what the file should be, with article, for messages.
    Raises: FormatError if the file is missing, truncated, hostile, of another kind or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file. Check the name and the folder.")
    try:
        check_header_length(path)
        with safe_open(str(path), framework="pt") as file:
            _check_shapes(path, file)
            yield _parse(path, (file.metadata() or {}).get(key), newest, kind), file
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: the file is damaged or incomplete ({error}). Download or make it again.") from None


def damaged(path: str | Path, found: str) -> FormatError:
    """What to raise for a file whose contents are not what its kind has. found: what is wrong, in a few words."""
    return FormatError(f"{path}: the file is damaged ({found}). Download or make it again.")


def check_header_length(path: str | Path) -> None:
    """Raise FormatError if the file claims a header that no model needs; reads 8 bytes."""
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if length > LARGEST_HEADER_BYTES:
        raise FormatError(
            f"{path}: the file is damaged or hostile (a header of {length} bytes; at most {LARGEST_HEADER_BYTES} are read). "
            "Do not use it; download it again from a source that you trust."
        )


def printable(value: object) -> str | None:
    """A header's text as it may be shown: no control characters or line breaks, not endless. None for anything but text."""
    return "".join(filter(str.isprintable, value))[:LONGEST_TEXT] if isinstance(value, str) else None


def _check_shapes(path: Path, file: safe_open) -> None:
    for key in file.keys():  # noqa: SIM118 - safetensors' handle is no dict
        shape = tuple(file.get_slice(key).get_shape())
        if any(size > LARGEST_DIMENSION for size in shape):
            raise FormatError(
                f"{path}: {printable(key)}: shape {shape} is damaged or hostile. "
                "Do not use the file; download it again from a source that you trust."
            )


def _parse(path: Path, text: str | None, newest: int, kind: str) -> dict:
    if text is None:
        raise FormatError(
            f"{path}: this is not {kind}. Choose another, or open it with the loader it was made for: a checkpoint with Load Checkpoint."
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    version = header.get("version") if isinstance(header, dict) else None
    if type(version) is not int or version < 1:
        raise FormatError(f"{path}: the header of this file is damaged. Download or make it again.")
    if version > newest:
        raise FormatError(f"{path}: made by a newer StepQuant (format {version}; this one reads up to {newest}). Update StepQuant.")
    return header
