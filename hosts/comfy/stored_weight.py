"""What a quantized layer's state_dict() shows in its weight's place. Holds no data; codes are saved by save.py and dense_saving.py."""

from __future__ import annotations

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor


class StoredWeight(Tensor):
    """The outer shape and dtype of a quantized weight, no data, and as nbytes what it really takes.

    A reader that wants data gets an error and not codes that it would take for weights.
    """

    stored_bytes: int

    @property
    def nbytes(self) -> int:
        return self.stored_bytes


def shown(weight: QuantizedTensor) -> StoredWeight:
    """What stands for this weight; made once, and kept with it."""
    stored = getattr(weight, "_stepquant_shown", None)
    if stored is None:
        stored = torch.empty(weight.shape, dtype=weight.dtype, device="meta").as_subclass(StoredWeight)
        stored.stored_bytes = weight._qdata.nbytes
        weight._stepquant_shown = stored
    return stored
