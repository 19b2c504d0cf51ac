"""Runs a quantized UNet with its weights held in place and, where nothing speaks against it, as a CUDA graph.

Bound as `_forward` of the UNet instance, so inside of every wrapper: ComfyUI's sampler, ControlNet, and nodes that call
or wrap the UNet reach it alike. What a replay could get wrong is in the key or makes the call run eagerly, with a
reason that is logged once and shown by System check. Which calls may become a graph is in graph_limits.py.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from comfy.cli_args import args
from torch import Tensor, nn

from ...kernels import dispatch
from ..acceleration import Acceleration
from .graph_capture import CudaRecorder, Recording, is_capturing
from .graph_inputs import StaticInputs, UNetCall
from .graph_limits import ForeignCode, foreign_attention, unsuitable
from .guard import Unowned
from .ops import QuantizableOp
from .residency import Residency

logger = logging.getLogger(__name__)
# Shapes in use at the same time: two resolutions (a high-resolution pass), each with and without CFG.
LARGEST_NUMBER_OF_GRAPHS = 4
LARGEST_NUMBER_OF_SIZES_SEEN = 16
OUT_OF_MEMORY = "VRAM ran out while all weights were kept in it"
_runners: weakref.WeakSet[UNetRunner] = weakref.WeakSet()


@dataclass
class _Graph:
    """keeps: tensors that the graph reads and nobody else may be holding by the time of a replay."""

    inputs: StaticInputs
    recording: Recording
    keeps: tuple


class UNetRunner:
    """One per UNet instance; a UNet lives on one device at a time.

    `last_reason`: why the last call did not run as a graph, None if it did. `replays`: how often one has run.
    """

    def __init__(self, unet: nn.Module, state: Any, make_recorder: Callable[[torch.device], CudaRecorder | str]) -> None:
        """state: the model's QuantizedState; read for acceleration, tap, K/V cache and what lora.py notes in it."""
        self.residency = Residency(unet)
        self.last_reason: str | None = None
        self.replays = 0
        self._inner = _inner_forward(unet)
        self._state_ref = weakref.ref(state)
        self._make_recorder = make_recorder
        self._foreign = ForeignCode(list(unet.modules())[1:])
        self._convs = [module for module in unet.modules() if isinstance(module, QuantizableOp) and isinstance(module, nn.Conv2d)]
        self._recorder: CudaRecorder | None = None
        self._recorder_device: torch.device | None = None
        self._compiled: set[Hashable] = set()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._standing: Hashable = None
        self._blocked: str | None = None
        self._paused: list[str] = []
        self._told: set[str] = set()
        _runners.add(self)

    def __deepcopy__(self, memo: dict) -> Callable[..., Tensor]:
        """Graphs cannot be copied: a copy of the UNet runs without."""
        return copy.deepcopy(self._inner, memo)

    @property
    def _state(self) -> Any:
        return self._state_ref()

    @property
    def number_of_graphs(self) -> int:
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        return sum(graph.recording.nbytes for graph in self._graphs.values())

    def __call__(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: dict[str, list] | None = None,
        transformer_options: dict[str, Any] | None = None,
        **others: Any,
    ) -> Tensor:
        """As ComfyUI's UNetModel._forward."""
        options = {} if transformer_options is None else transformer_options
        call = UNetCall(x, timesteps, context, y, control, options, others)
        if torch.compiler.is_compiling() or is_capturing(x.device):  # nothing may be filled or noted in somebody else's graph
            return self._inner_call(call)
        if self.residency.lease.held:  # called from inside of a call
            return self._eager(call)
        comfy.ops.run_every_op()
        reason = (self._paused and self._paused[-1]) or self._state.hooks_reason or self.residency.hold(x)
        if reason:
            self._note(reason)
            return self._eager(call)
        try:
            return self._held(call)
        except Exception as error:
            comfy.model_management.raise_non_oom(error)
            self._give_up_memory()
        finally:
            self.residency.release()
        return self._eager(call)

    def invalidate(self) -> None:
        """Weights were loaded or patched: look anew where they are. Graphs stay, if they turn out to be where they were."""
        self.residency.invalidate()
        self._blocked = None

    def release(self) -> None:
        """The model is unloaded: free the graphs, their memory and every hold on weights."""
        self._drop_graphs()
        self._recorder = self._recorder_device = None
        self._blocked = None
        self.residency.clear()

    @contextmanager
    def paused(self, reason: str) -> Iterator[None]:
        """Run layer by layer while the block runs, for someone who watches the layers."""
        self._paused.append(reason)
        try:
            yield
        finally:
            self._paused.remove(reason)

    def describe(self) -> str:
        """The state in one sentence, for System check."""
        if self.last_reason is not None:
            return f"no CUDA graph in the last step: {self.last_reason}"
        if self.number_of_graphs:
            return f"CUDA graph: {self.number_of_graphs} shape(s), {self.replays} steps replayed"
        return "CUDA graph: none recorded yet; the second step of the same size records one"

    def _eager(self, call: UNetCall) -> Tensor:
        self._open_cache(call)
        return self._inner_call(call)

    def _inner_call(self, call: UNetCall) -> Tensor:
        # The UNet empties the lists it takes residuals from, and a call may have to be repeated.
        control = call.control and {name: list(residuals) for name, residuals in call.control.items()}
        arguments = (call.x, call.timesteps, call.context, call.y, control, call.transformer_options)
        scope = self._state.scope
        if scope is None:
            return self._inner(*arguments, **call.others)
        scope.standing = (self._state.patch_version, self._state.saturation.key) if self.residency.lease.held else None
        try:
            return self._inner(*arguments, **call.others)
        finally:
            scope.standing = None

    def _open_cache(self, call: UNetCall) -> Hashable:
        """Compute the prompt's keys and values if they are new: now, and not in a graph. blocks/unet.py closes the cache."""
        cache = self._state.kv_cache
        return None if cache is None else cache.open(call.transformer_options, call.context)

    def _held(self, call: UNetCall) -> Tensor:
        """With all weights kept in place."""
        self._compile_ahead(call)
        reason = self._unsuitable(call)
        self._note(reason)
        if reason is not None:
            self.residency.lend()
            return self._eager(call)
        key = self._key(call)
        if key in self._graphs:
            self._graphs.move_to_end(key)
        elif key in self._seen:
            if not self._record(key, call):
                return self._eager(call)
        else:  # the first call of its kind compiles kernels; and a size that does not come again costs no memory
            self.residency.lend()
            output = self._recorder.warm_up(lambda: self._graph_call(call))
            self._remember(key, output)
            return output
        graph = self._graphs[key]
        graph.inputs.load(call)
        self.replays += 1
        return graph.recording.replay()

    def _compile_ahead(self, call: UNetCall) -> None:
        """Before the first call of its size: many kernels at a time, where the call would compile one after the other.

        Runs the call on arbitrary values, so not where another node would see these.
        """
        if call.layout in self._compiled or unsuitable(call) or self._foreign.present():
            return
        self._compiled.add(call.layout)
        self.residency.lend()
        dispatch.compile_ahead(lambda: self._inner_call(call), call.x.device)

    def _unsuitable(self, call: UNetCall) -> str | None:
        if self._state.acceleration is not Acceleration.AUTO:
            return f"acceleration is set to {self._state.acceleration.value}"
        reason = self._blocked or unsuitable(call) or self._foreign.present() or foreign_attention()
        if reason is None and self._recorder_device != call.x.device:
            recorder = self._make_recorder(call.x.device)
            if isinstance(recorder, str):
                return recorder
            self._recorder, self._recorder_device = recorder, call.x.device
        return reason

    def _key(self, call: UNetCall) -> Hashable:
        """Equal keys: the same kernels on the same addresses, up to the contents of inputs, weights and caches."""
        state = self._state
        standing = (self.residency.version, state.patch_version, state.tap.version)
        if standing != self._standing:  # counters only rise: no graph of before can match again
            self._drop_graphs()
            self._standing = standing
        padding = tuple((conv.padding_mode, "_conv_forward" in vars(conv)) for conv in self._convs)
        return call.layout, self._open_cache(call), padding, state.saturation.key

    def _record(self, key: Hashable, call: UNetCall) -> bool:
        while len(self._graphs) >= LARGEST_NUMBER_OF_GRAPHS:
            self._graphs.popitem(last=False)[1].recording.release()
        self.residency.lend()
        inputs = StaticInputs(call)
        inputs.load(call)
        static = inputs.call(call.transformer_options)
        try:
            with torch.inference_mode(False):
                output = torch.empty_like(self._seen[key], device=call.x.device)
            recording = self._recorder.record(lambda: self._recorded_call(static), output)
        except Exception as error:
            if comfy.model_management.is_oom(error):
                raise
            logger.debug("the CUDA graph could not be recorded", exc_info=True)
            self._blocked = f"it could not be recorded ({type(error).__name__}: {str(error).strip()[:160]})"
            self._note(self._blocked)
            self._recorder = self._recorder_device = None  # its stream may still be in the middle of a recording
            return False
        self._graphs[key] = _Graph(inputs, recording, (*self._state.tap.tensors(), *self._state.saturation.tensors(), *self._scales()))
        return True

    def _scales(self) -> tuple[Tensor, ...]:
        return () if self._state.scales is None else self._state.scales.tensors()

    def _graph_call(self, call: UNetCall) -> Tensor:
        with nullcontext() if self._state.scope is None else self._state.scope.for_graph():
            return self._inner_call(call)

    def _recorded_call(self, static: UNetCall) -> Tensor:
        try:
            return self._graph_call(static)
        finally:
            if self._state.scope is not None:
                self._state.scope.forget()  # its tensors are the recording's

    def _remember(self, key: Hashable, output: Tensor) -> None:
        self._seen[key] = torch.empty_like(output, device="meta")
        while len(self._seen) > LARGEST_NUMBER_OF_SIZES_SEEN:
            self._seen.popitem(last=False)

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            graph.recording.release()
        self._graphs.clear()
        self._seen.clear()  # what is new must run once before it can be recorded

    def _give_up_memory(self) -> None:
        self.release()
        self.residency.refuse(OUT_OF_MEMORY)
        self._note(OUT_OF_MEMORY)
        comfy.model_management.soft_empty_cache()

    def _note(self, reason: str | None) -> None:
        self.last_reason = reason
        if reason is not None and reason not in self._told:
            self._told.add(reason)
            logger.info("StepQuant: no CUDA graph: %s.", reason)


def make_recorder(device: torch.device) -> CudaRecorder | str:
    """A recorder, or why there can be none on this device."""
    if device.type != "cuda" or not comfy.model_management.is_nvidia():
        return "CUDA graphs need an NVIDIA GPU"
    if getattr(args, "disable_cuda_graphs", False):
        return "ComfyUI was started with --disable-cuda-graphs"
    return CudaRecorder(device)


def bind_runner(unet: nn.Module, state: Any, make_recorder: Callable[[torch.device], CudaRecorder | str] = make_recorder) -> UNetRunner:
    """Let the UNet's calls go through a runner; what its `_forward` was runs inside."""
    runner = UNetRunner(unet, state, make_recorder)
    unet._forward = runner
    return runner


class _StockForward:
    """The class's `_forward`, without owning the UNet, which owns the runner: a cycle would keep gigabytes until the next
    collection. A copy is of the copied UNet."""

    def __init__(self, unet: nn.Module) -> None:
        self._unet = Unowned(unet)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        unet = self._unet()
        return type(unet)._forward(unet, *args, **kwargs)


def _inner_forward(unet: nn.Module) -> Callable[..., Tensor]:
    """What is bound to the UNet by now, else its class's."""
    bound = vars(unet).get("_forward")
    return bound if bound is not None else _StockForward(unet)


def describe_runners() -> list[str]:
    """One sentence for each quantized model in memory."""
    return [runner.describe() for runner in _runners]
