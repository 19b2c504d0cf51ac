"""The MODELs that a contract is tried on: the float one, ours in each compute mode, and ComfyUI's own int8 of the same codes."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from fake_graph import use_fake_graphs
from sampling_run import sample_latent

from stepquant.hosts.comfy.attach import state_of
from stepquant.hosts.comfy.export_native import export_native
from stepquant.hosts.comfy.quantize import quantize_model

# Layer by layer; with our forwards on blocks; with those and the UNet as a graph (on a CPU the recording runs its work again).
ACCELERATION = {"plain": "off", "fused": "fused", "graph": "auto"}
DEVICE = os.environ.get("STEPQUANT_TEST_DEVICE", "cpu")
ON_CPU = DEVICE == "cpu"
# Without dynamic VRAM the modes differ in nothing that the CPU does not show; the graph does.
MODES_OF = {"cpu": tuple(ACCELERATION), "gpu": tuple(f"gpu-{mode}" for mode in ACCELERATION), "gpu-classic": ("gpu-classic",)}
MODES, ALL_MODES = MODES_OF[DEVICE], [mode for modes in MODES_OF.values() for mode in modes]
# On a GPU a call may take other algorithms than the one before it. No contract's feature changes less than 5 %.
LARGEST_DRIFT = 0 if ON_CPU else 0.02
Sample = Callable[..., torch.Tensor]  # (model, steps=2) -> latent


class Subject:
    """A MODEL and what it gives in one step when nothing is done to it: shows whether anything was left behind."""

    def __init__(self, model: ModelPatcher, sample: Sample) -> None:
        self.model = model
        self._sample = sample
        self._before = sample(model, steps=1)

    def is_as_before(self) -> bool:
        """Bit for bit on a CPU."""
        return is_same(self._sample(self.model, steps=1), self._before)


class Family:
    """All MODELs of one source file. `sample`: a plain run of it."""

    def __init__(self, source: Path, folder: Path, sample: Sample = sample_latent) -> None:
        self._source, self._folder, self._sample = source, folder, sample
        self._ours: dict[str, Subject] = {}

    @cached_property
    def reference(self) -> Subject:
        return Subject(self._load(self._source), self._sample)

    @cached_property
    def plain_picture(self) -> torch.Tensor:
        """The float MODEL's, when nothing is done to it."""
        return self._sample(self.reference.model)

    @cached_property
    def native(self) -> Subject:
        path = self._folder / f"native_{self._source.name}"
        export_native(self.ours(MODES[0]).model, path)
        return Subject(self._load(path), self._sample)

    def ours(self, mode: str) -> Subject:
        if mode not in self._ours:
            model = quantize_model(self.reference.model, "w8a8-token", acceleration=acceleration_of(mode))
            if mode == "graph":
                use_fake_graphs(model)
            self._ours[mode] = Subject(model, self._sample)
        return self._ours[mode]

    def discard(self, mode: str) -> None:
        """After a failed contract: whatever it left behind must not fail the next."""
        self._ours.pop(mode, None)

    def discard_native(self) -> None:
        """As `discard`: ComfyUI keeps what it was fetching when an error comes, and would take it for the next weight."""
        self.__dict__.pop("native", None)

    @staticmethod
    def _load(path: Path) -> ModelPatcher:
        return comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]


def acceleration_of(mode: str) -> str:
    """What a compute mode is called where an artist chooses it."""
    return ACCELERATION.get(mode.removeprefix("gpu-"), "auto")


def relative_error(test: torch.Tensor, reference: torch.Tensor) -> float:
    """|test - reference| / |reference|"""
    return ((test - reference).norm() / reference.norm()).item()


def is_same(test: torch.Tensor, reference: torch.Tensor) -> bool:
    """Whether nothing was changed between two calls: bit for bit on a CPU."""
    return relative_error(test, reference) <= LARGEST_DRIFT


def another(model: ModelPatcher) -> ModelPatcher:
    """A second MODEL of the same kind and weights, sharing nothing: made as ComfyUI makes one for another GPU."""
    state, again = state_of(model), model.clone(disable_dynamic=True, force_deepcopy=True)
    if state is not None and "_forward" in vars(again.model.diffusion_model) and _has_fake_graphs(state):
        use_fake_graphs(again)
    return again


def _has_fake_graphs(state) -> bool:
    return state.runner is not None and state.runner._make_recorder.__module__ == "fake_graph"
