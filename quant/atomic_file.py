"""Writes a safetensors file so that a full disk, a crash or a cancel leaves either the old file or the new one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FormatError


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write to a temporary name in the same folder, then rename.

    Raises: FormatError if the folder is missing or read-only, or the disk is full.
    """
    path = Path(path)
    try:
        # The temporary file is made first: a read-only folder shows before minutes of work, and names never collide.
        handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".part", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise FormatError(f"{path}: cannot write here ({error.strerror}). Choose a folder that exists and that you may write to.") from None
    try:
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: writing failed ({error}). Free disk space or choose another folder; nothing was changed.") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
