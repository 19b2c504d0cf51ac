"""Writes a file so that a full disk, a crash or a cancel leaves either the old file or the new one."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FormatError

SUFFIX = ".part"
# A file that is still being written changes every second; one left by a killed process does not.
ABANDONED_SECONDS = 600


@contextmanager
def replaced_when_done(path: Path) -> Iterator[Path]:
    """Yield a temporary file in the same folder that becomes `path` when the block ends, and is removed if it raises.

    Raises: FormatError if the folder is missing or read-only, or the disk is full.
    """
    temporary = make_temporary(path)
    try:
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: writing failed ({error}). Free disk space or choose another folder; nothing was changed.") from None
    finally:
        temporary.unlink(missing_ok=True)


def make_temporary(path: Path) -> Path:
    """An empty file beside `path`, under a name that never collides: a read-only folder shows before minutes of work.

    Raises: FormatError if the folder is missing or read-only.
    """
    _remove_abandoned(path)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=SUFFIX, dir=path.parent)
    except OSError as error:
        raise FormatError(f"{path}: cannot write here ({error.strerror}). Choose a folder that exists and that you may write to.") from None
    os.close(handle)
    return Path(temporary)


def _remove_abandoned(path: Path) -> None:
    """What a process that was killed while writing `path` has left: gigabytes, under a hidden name."""
    start = f".{path.stem}."
    with suppress(OSError):  # a folder that cannot be read is reported by what follows
        for left in path.parent.iterdir():
            if left.name.startswith(start) and left.suffix == SUFFIX and time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink()


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises: FormatError if the folder is missing or read-only, or the disk is full.
    """
    with replaced_when_done(Path(path)) as temporary:
        save_file(dict(tensors), str(temporary), metadata=dict(metadata))
