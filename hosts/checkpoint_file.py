"""Opens an unquantized safetensors checkpoint or UNet file as a dict of tensors, with readable errors. Builds no modules."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import FormatError, ModelError
from ..quant.file_format import HEADER_KEY
from ..quant.layers import UNET_PREFIX, check_is_sdxl

HASH_BLOCK_BYTES = 1 << 22


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping: a tensor is read when asked for, and not kept."""

    def __init__(self, handle: safe_open) -> None:
        self._handle = handle
        self._names = dict.fromkeys(handle.keys())
        self.metadata: dict[str, str] = handle.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._handle.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle.get_slice(name).get_shape())

    @property
    def unet_prefix(self) -> str:
        """What stands before the UNet's names: nothing in a file that is a bare UNet."""
        return UNET_PREFIX if any(name.startswith(UNET_PREFIX) for name in self._names) else ""

    def unet_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each UNet tensor by its LDM name without prefix."""
        prefix = self.unet_prefix
        return {name[len(prefix) :]: self.shape(name) for name in self._names if name.startswith(prefix)}


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[TensorFile]:
    """Open an unquantized SDXL checkpoint or UNet file in LDM names.

    Raises: FormatError if the file is missing, damaged or no safetensors file; ModelError if it is not SDXL or
        quantized already.
    """
    with open_tensor_file(path) as file:
        if HEADER_KEY in file.metadata:
            raise ModelError(f"{path}: already quantized by StepQuant. Give the checkpoint it was made from.")
        check_is_sdxl(file.unet_shapes(), str(path))
        yield file


@contextmanager
def open_tensor_file(path: str | Path) -> Iterator[TensorFile]:
    """Open any safetensors file.

    Raises: FormatError if the file is missing, damaged or no safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file. Check the name and the folder.")
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise FormatError(f"{path}: a pickle file, which can run code when opened. Convert it to safetensors first.")
    try:
        handle = safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: the file is damaged or no safetensors file ({error}). Download or make it again.") from None
    with handle:
        yield TensorFile(handle)


def sha256_of(path: str | Path, after_block: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's bytes, in hex.

    Args:
        after_block: called with the bytes read since the last call, for progress; may raise to cancel.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
            if after_block is not None:
                after_block(len(block))
    return digest.hexdigest()
