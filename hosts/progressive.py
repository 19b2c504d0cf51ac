"""Lets a sampler go on from what the quantized model answers while the float model is observed. The same in every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..quant.observer import LayerObserver
from ..quant.progressive import rounded_input
from .sensitivity import copied


class QuantizedPrefix:
    """Repeats each of the UNet's calls with every layer's input rounded, and answers with that.

    running: whether such a repetition is under way; observers must not count it.
    """

    def __init__(
        self,
        unet: nn.Module,
        layers: Mapping[str, nn.Module],
        observers: Mapping[str, LayerObserver],
        buckets: Callable[[], list[int]],
        passes_by: Callable[[], bool] = lambda: False,
    ) -> None:
        """buckets: of the call under way. passes_by: whether that call is no step of the sampler and keeps its answer."""
        self._unet, self._layers, self._observers, self._buckets, self._passes_by = unet, layers, observers, buckets, passes_by
        self._arguments: tuple[tuple, dict] = ((), {})
        self.running = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Answer so while the block runs; nothing is left on the model after it."""
        handles = [
            self._unet.register_forward_pre_hook(self._before, with_kwargs=True),
            self._unet.register_forward_hook(self._after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, _unet: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.running and not self._passes_by():
            # ControlNet's residuals are taken out of their lists by the call.
            self._arguments = (args, kwargs | {"control": copied(kwargs["control"])} if "control" in kwargs else kwargs)

    def _after(self, _unet: nn.Module, _args: tuple, _kwargs: dict, _output: object) -> object:
        """The rounded model's answer in the place of the float one's; None leaves that."""
        if self.running or self._passes_by():
            return None
        self.running = True
        handles = [module.register_forward_pre_hook(self._rounding(name)) for name, module in self._layers.items()]
        try:
            with torch.no_grad():
                args, kwargs = self._arguments
                return self._unet(*args, **kwargs)
        finally:
            self.running = False
            for handle in handles:
                handle.remove()

    def _rounding(self, name: str) -> Callable[[nn.Module, tuple], tuple | None]:
        def before_layer(_layer: nn.Module, args: tuple[Tensor, ...]) -> tuple | None:
            buckets, observer = self._buckets(), self._observers.get(name)
            if observer is None or not buckets:
                return None
            return (rounded_input(name, args[0], observer, buckets[0]), *args[1:])

        return before_layer
