"""File names that artists type, and a file's state for ComfyUI's cache. Opens no file."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import FormatError

EXTENSION = ".safetensors"
# What Windows does not allow in a name; refused everywhere, so that a workflow works on every system.
FORBIDDEN = set('<>:"|?*') | {chr(code) for code in range(32)}


def checked_name(name: str, folder: str) -> str:
    """Full path of the file to write; its folder is made.

    Args:
        name: with or without the extension; may name subfolders.
    Raises: FormatError if the name is empty, leaves `folder`, has characters that a system forbids, or its folder cannot be made.
    """
    cleaned = name.strip().replace("\\", "/").removesuffix(EXTENSION)
    parts = [part for part in cleaned.split("/") if part]
    if not parts or cleaned.startswith("/") or ".." in parts or FORBIDDEN & set(cleaned):
        raise FormatError(f"file name {name!r}: not a usable name. Give a plain one, such as my-sdxl-w8a8 or quantized/my-sdxl-w8a8.")
    path = Path(folder, *parts[:-1], parts[-1] + EXTENSION)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FormatError(f"{path.parent}: cannot make this folder ({error.strerror}). Choose another file name.") from None
    return str(path)


def file_state(path: str | None) -> str:
    """Path, modification time and size: changes when the file is replaced, so that ComfyUI reads it again."""
    try:
        state = os.stat(path or "")
    except OSError:
        return f"{path}: missing"
    return f"{path}:{state.st_mtime_ns}:{state.st_size}"
