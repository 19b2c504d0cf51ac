"""Watches how much of each static layer's input is clipped, and lets a layer above the limit measure its input for the rest of a run.

The kernels count on the device. After a step (one evaluation of the model) the counts are copied to the host behind the
step's work, and looked at where the next step begins or ends, if they have arrived: nothing ever waits for the GPU, and a
GPU that lags behind only makes the switch later. Calibrated scales stay as they are. Not under torch.compile, which cannot
see a layer change its mode; and of several GPUs only the first one's layers are watched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...quant.saturation import LayerSaturation, Switch, describe_run
from .ops import QuantizableOp

logger = logging.getLogger(__name__)
WRAPPER_KEY = "stepquant_saturation"
# Two counters a slot, on 16 bytes: Triton compiles another kernel for a pointer that is aligned to less.
SLOT_WIDTH = 4


class SaturationGuard:
    """One per model. `key`: what a CUDA graph depends on, the layers that are switched and where the counters lie."""

    def __init__(self, unet: nn.Module, limit: float) -> None:
        """limit: share of clipped values above which a layer switches; 1 never switches, and nothing is counted."""
        modules = unet.modules() if limit < 1 else ()
        layers = [module for module in modules if isinstance(module, QuantizableOp) and module.is_quantized and module.scheme.is_static]
        self._slots = [LayerSaturation([layer.layer_name], layer.weight.shape[1]) for layer in layers]
        for layer, slot in zip(layers, self._slots, strict=True):
            layer.saturation = slot
        self._limit = limit
        self._counters: Tensor | None = None  # (slots, SLOT_WIDTH), on the UNet's device
        self._arrived: Tensor | None = None  # the same on the host
        self._event: torch.cuda.Event | None = None
        self._pending = False
        self._step = 0
        self._switches: list[Switch] = []
        self._said: list[str] | None = None  # while somebody collects it
        self._serial = 0
        self.key: Hashable = (0, ())

    @property
    def watches(self) -> bool:
        return bool(self._slots)

    def tensors(self) -> tuple[Tensor, ...]:
        """What a recorded kernel writes, by address."""
        return () if self._counters is None else (self._counters,)

    def begin_run(self) -> None:
        """A sampling run begins: every layer uses its stored scales again."""
        for slot in self._slots:
            slot.switched = False
        self._step, self._switches, self._pending = 0, [], False
        if self._counters is not None:
            self._counters.zero_()
        self._note_key()

    def before_step(self, device: torch.device) -> None:
        if self.watches and (self._counters is None or self._counters.device != device):
            self._place(device)
        self._look()

    def after_step(self) -> None:
        """Send the step's counts on their way, unless earlier ones are still: they then go with the next."""
        self._step += 1
        self._look()
        if self._pending or self._counters is None:
            return
        self._arrived.copy_(self._counters, non_blocking=True)
        self._counters.zero_()
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._counters.device))
        self._pending = True

    def end_run(self) -> None:
        """The sampling run is over: say what was switched, once."""
        if self._switches:
            text = describe_run(self._switches)
            if self._said is not None:
                self._said.append(text)
            logger.warning("StepQuant: %s. That is slower; calibrate with the LoRAs, ControlNets and resolutions in use to avoid it.", text)
        self.begin_run()

    def unloaded(self) -> None:
        """The model is unloaded: hold on to no memory of the device."""
        for slot in self._slots:
            slot.counters = None
        self._counters = self._arrived = self._event = None
        self._pending = False

    @contextmanager
    def collected(self) -> Iterator[list[str]]:
        """What end_run says of the runs inside of the block."""
        self._said = said = []
        try:
            yield said
        finally:
            self._said = None

    def _place(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        with torch.inference_mode(False):  # plain tensors: ones born in inference mode could not be updated outside of it
            self._counters = torch.zeros(len(self._slots), SLOT_WIDTH, dtype=torch.int32, device=device)
            self._arrived = torch.zeros(len(self._slots), SLOT_WIDTH, dtype=torch.int32, pin_memory=is_cuda)
            for slot, counters in zip(self._slots, self._counters.unbind(), strict=True):
                slot.counters = counters[:2]
        self._event = torch.cuda.Event() if is_cuda else None
        self._pending = False
        self._serial += 1
        self._note_key()

    def _look(self) -> None:
        """Switch the layers above the limit, if the counts have arrived."""
        if not self._pending or not (self._event is None or self._event.query()):
            return
        self._pending = False
        for index, share in _shares_above(self._arrived, [slot.inputs for slot in self._slots], self._limit):
            slot = self._slots[index]
            if not slot.switched:
                slot.switched = True
                self._switches.append(Switch(tuple(slot.layers), self._step, share))
                self._note_key()

    def _note_key(self) -> None:
        self.key = (self._serial, tuple(index for index, slot in enumerate(self._slots) if slot.switched))


def _shares_above(counts: Tensor, inputs: Sequence[int], limit: float) -> list[tuple[int, float]]:
    """(index, share) of the entries (clipped values, rows) whose share of clipped values is above the limit."""
    values = (counts[:, 1].double() * torch.tensor(inputs)).clamp_min(1)
    shares = counts[:, 0].double() / values
    return [(index, float(shares[index])) for index in (shares > limit).nonzero().flatten().tolist()]


def watch(patcher: ModelPatcher) -> None:
    """Look after every step that this patcher or a clone of it samples."""
    patcher.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, WRAPPER_KEY)
    patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, WRAPPER_KEY, _watched_step)


def _watched_step(executor: Callable, model: nn.Module, conds: list, x: Tensor, timestep: Tensor, model_options: dict) -> Any:
    guard = getattr(getattr(model, "stepquant", None), "saturation", None)
    if guard is None:
        return executor(model, conds, x, timestep, model_options)
    guard.before_step(x.device)
    output = executor(model, conds, x, timestep, model_options)
    guard.after_step()
    return output


@contextmanager
def said_of_runs(model: nn.Module) -> Iterator[list[str] | None]:
    """What is said of the runs of a BaseModel inside of the block; None if it has no layers to watch."""
    guard = getattr(getattr(model, "stepquant", None), "saturation", None)
    if guard is None or not guard.watches:
        yield None
        return
    with guard.collected() as runs:
        yield runs
