"""Dynamic VRAM: weights come in when a layer asks for them, and go when something else needs the room. And: a graph is really used."""

import pytest
import torch
from sampling_run import sample_latent

from .artist import with_adapter
from .subjects import DEVICE, ON_CPU, is_same

needs_dynamic_vram = pytest.mark.skipif(DEVICE != "gpu", reason="needs an NVIDIA GPU: STEPQUANT_TEST_DEVICE=gpu")
ROOM = 2**18  # what another model asks for


def _take_room(model) -> None:
    assert model.partially_unload(None, ROOM) > 0, "no weight was in VRAM"


@needs_dynamic_vram
def test_weights_taken_away_between_two_pictures(contract):
    def use(model):
        first = sample_latent(model)
        _take_room(model)
        second = sample_latent(model)
        assert is_same(second, first), "the picture changed"
        return second

    contract("dynamic VRAM: weights taken away between two pictures", use, shows=False)


@needs_dynamic_vram
def test_weights_taken_away_in_the_middle_of_a_run(contract):
    def use(model):
        patched = model.clone()

        def call(executor, *args, **kwargs):
            result = executor(*args, **kwargs)
            _take_room(patched)
            return result

        patched.add_wrapper_with_key("diffusion_model", "test", call)
        return sample_latent(patched)

    contract("dynamic VRAM: weights taken away at each step", use, shows=False)


@needs_dynamic_vram
def test_patches_changed_while_weights_are_resident(contract, add_lora):
    """A branch, a merge that is quantized anew as it faults in, and the bare model, all on the same weights in VRAM."""

    def use(model):
        patched = [add_lora(model), with_adapter(model, "dora"), model]
        results = [sample_latent(one) for one in patched]
        assert all(is_same(sample_latent(one), result) for one, result in zip(patched, results, strict=True)), "a patch stayed on"
        return torch.cat(results)

    contract("dynamic VRAM: LoRA, DoRA and none in turn", use)


@needs_dynamic_vram
def test_patches_that_fault_in_anew(contract):
    def use(model):
        patched = with_adapter(model, "lokr")
        first = sample_latent(patched)
        _take_room(patched)
        assert is_same(sample_latent(patched), first), "a patch was lost with its weight"
        return first

    contract("dynamic VRAM: patched weights taken away", use)


@pytest.mark.skipif(ON_CPU, reason="needs an NVIDIA GPU: STEPQUANT_TEST_DEVICE=gpu or gpu-classic")
def test_graph_is_replayed(family, mode):
    """Else the contracts of the graph mode would say nothing about graphs. Dynamic VRAM may cost the first step of a run."""
    if mode in ("gpu-plain", "gpu-fused"):
        return
    model = family().ours(mode).model
    runner = model.model.stepquant.runner
    sample_latent(model)
    before = runner.replays
    sample_latent(model, steps=4)
    assert runner.last_reason is None and runner.replays - before >= 3
