"""Probes a running UNet: adds noise to one layer at a time and watches its output. The same in every engine; samples nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..quant.sensitivity import LayerSensitivity, SensitivityRecord, input_noise, probe_buckets, probe_groups


class SensitivityProbe:
    """Repeats a few of the UNet's calls once per layer, with noise in that layer, right after the call itself.

    So it sees the model as it runs: its patches, ControlNets and conditioning. `running`: whether such a repetition is under
    way; observers must not count it. repetitions: how many there will be at most. on_tick: called with (repetitions done,
    in all) after each.
    """

    def __init__(self, unet: nn.Module, layers: Mapping[str, nn.Module], buckets: Callable[[], list[int]], probes: int) -> None:
        """buckets: of the call under way. probes: how many parts of the schedule are probed; 0 for none."""
        self._unet, self._layers, self._buckets = unet, layers, buckets
        self.on_tick: Callable[[int, int], None] | None = None
        self._done = 0
        self._due = probe_buckets(probes)
        self._groups = probe_groups(layers)
        self._records = {name: SensitivityRecord() for name in layers}
        self.repetitions = len(self._due) * len(self._groups)
        self._generator = torch.Generator().manual_seed(0)
        self._arguments: tuple[tuple, dict] = ((), {})
        self.running = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Probe while the block runs; nothing is left on the model after it."""
        handles = [
            self._unet.register_forward_pre_hook(self._before, with_kwargs=True),
            self._unet.register_forward_hook(self._after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def sensitivity(self) -> dict[str, LayerSensitivity]:
        """By layer; layers that were never reached are left out."""
        return {name: record.sensitivity() for name, record in self._records.items() if record.buckets}

    def _before(self, _unet: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.running:
            self._arguments = (args, kwargs | {"control": copied(kwargs["control"])} if "control" in kwargs else kwargs)

    def _after(self, _unet: nn.Module, _args: tuple, _kwargs: dict, output: object) -> None:
        bucket = max(self._buckets(), default=0)
        if self.running or not self._due or bucket > self._due[0]:
            return
        self._due = [due for due in self._due if due < bucket]
        self.running = True
        try:
            for group in self._groups:
                with torch.no_grad():
                    self._probe(group, bucket, _answer(output))
                self._done += 1
                if self.on_tick is not None:
                    self.on_tick(self._done, self.repetitions)
        finally:
            self.running = False

    def _probe(self, group: list[str], bucket: int, reference: Tensor) -> None:
        relative, ratios = {}, {}
        handles = [self._layers[name].register_forward_hook(self._noisy(name, relative, ratios)) for name in group]
        try:
            args, kwargs = self._arguments
            answer = _answer(self._unet(*args, **(kwargs | {"control": copied(kwargs["control"])} if "control" in kwargs else kwargs)))
        finally:
            for handle in handles:
                handle.remove()
        total = sum(relative.values())
        if total <= 0:
            return
        noise = (answer.double() - reference.double()).square().sum() / reference.double().square().sum()
        for name in relative:
            self._records[name].add(bucket, float(noise) / total, ratios[name])

    def _noisy(self, name: str, relative: dict[str, float], ratios: dict[str, float]):
        def after_layer(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0]
            noisy = layer.forward(x + input_noise(name, x, self._generator), *args[1:])
            energy = output.double().square().sum()
            relative[name] = relative.get(name, 0.0) + float((noisy.double() - output.double()).square().sum() / energy)
            rows_in, rows_out = x.numel() / _channels(x), output.numel() / _channels(output)
            ratios[name] = float(energy / rows_out / (x.double().square().sum() / rows_in))
            return noisy

        return after_layer


def _channels(x: Tensor) -> int:
    return x.shape[1] if x.ndim == 4 else x.shape[-1]


def _answer(output: object) -> Tensor:
    """The UNet's answer as engines wrap it: a tensor, a tuple, or an object with `sample`."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


def copied(value: object) -> object:
    """Containers anew, tensors shared: the UNet takes ControlNet's residuals out of their lists."""
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return [copied(part) for part in value] if isinstance(value, list) else value
