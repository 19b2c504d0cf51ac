"""The file that a MODEL was loaded from: its name and SHA-256 go into the header of what is made of it."""

from __future__ import annotations

import os

import comfy.model_management
import comfy.utils

from ..hosts.checkpoint_file import sha256_of


def loaded_from(model) -> str | None:
    """Path of the file that ComfyUI would load this MODEL from again; None if it was made in another way."""
    return _file_of(model.cached_patcher_init)


def made_from(model) -> str | None:
    """Path of the file behind the MODEL that this one was quantized from; None if this one was itself loaded from a file."""
    init = model.cached_patcher_init
    source = init[1][0] if init is not None and init[1] else None
    return _file_of(source) if isinstance(source, tuple) else None


def _file_of(init: tuple | None) -> str | None:
    """init: ComfyUI's (function, arguments), the first argument being the path."""
    path = init[1][0] if init is not None and init[1] else None
    return path if isinstance(path, str) and os.path.isfile(path) else None


def sha256(path: str) -> str:
    """Hexadecimal digest; shows progress and stops when the run is cancelled."""
    bar = comfy.utils.ProgressBar(max(1, os.path.getsize(path)))

    def after_block(size: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(size)

    return sha256_of(path, after_block)
