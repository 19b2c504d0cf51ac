"""Weights held in place during a UNet call: what layers then read, what a graph may rely on, and what happens when they move.

Dynamic VRAM needs a GPU; here its pages are stood in for by copies that an eviction overwrites.
"""

import comfy.ops
import pytest
import torch
from fake_graph import use_fake_graphs

from stepquant.hosts.acceleration import Acceleration
from stepquant.hosts.comfy.attach import state_of
from stepquant.hosts.comfy.lora import quantized_layers
from stepquant.hosts.comfy.pages import DO_NOT_FIT
from stepquant.hosts.comfy.quantize import quantize_model
from stepquant.hosts.comfy.residency import EDITED, EVICTED_TOO_OFTEN, PARTLY_LOADED, Residency

STEPS = 4


class FakePages:
    """Places for the quantized layers' weights. evict() is what another model's load does."""

    def __init__(self, modules):
        self.places = {module: None for module in modules if getattr(module, "is_quantized", False)}
        self.fits, self.whole, self.pins, self.fills = True, False, 0, 0

    def covers_the_same(self, other):
        return other is self

    def holds(self, module):
        return module in self.places

    def pin(self):
        self.pins += self.whole
        return self.whole

    def fill(self, like):
        if not self.fits:
            return DO_NOT_FIT
        self.fills, self.whole, self.pins = self.fills + 1, True, self.pins + 1
        for module, place in self.places.items():
            if place is None:
                self.places[module] = module.weight.clone(), None if module.bias is None else module.bias.clone()
            else:
                place[0]._qdata.copy_(module.weight._qdata)
        return None

    def unpin(self):
        self.pins = 0

    def tensors(self, module):
        return self.places[module]

    def evict(self):
        self.whole = False
        for weight, _ in self.places.values():
            weight._qdata.zero_()


@pytest.fixture
def plain(model):
    """The same quantized MODEL without a graph: what every result must equal."""
    return quantize_model(model, "w8a8-token", acceleration=Acceleration.FUSED)


@pytest.fixture
def paged(quantized):
    """(MODEL under what stands for dynamic VRAM, its recorder, its pages)"""
    recorder = use_fake_graphs(quantized)
    runner, unet, made = state_of(quantized).runner, quantized.model.diffusion_model, []

    def find_pages(modules):
        made[:] = made or [FakePages(modules)]
        return made[0]

    runner.residency = Residency(unet, find_pages)
    runner.residency._pages = find_pages(runner.residency._modules)
    return quantized, recorder, made[0]


def _after_each_step(patcher, action):
    """A clone that does something after every UNet call."""

    def wrapper(executor, *args, **kwargs):
        result = executor(*args, **kwargs)
        action()
        return result

    clone = patcher.clone()
    clone.add_wrapper_with_key("apply_model", "test", wrapper)
    return clone


def test_graph_reads_the_weights_at_their_place(paged, plain, sample):
    quantized, recorder, pages = paged
    assert torch.equal(sample(quantized, steps=STEPS), sample(plain, steps=STEPS))
    assert (len(recorder.recordings), pages.fills, pages.pins) == (1, 1, 0)


def test_eviction_between_two_pictures_costs_no_new_graph(paged, plain, sample):
    quantized, recorder, pages = paged
    sample(quantized, steps=STEPS)
    pages.evict()
    assert torch.equal(sample(quantized, steps=STEPS, seed=2), sample(plain, steps=STEPS, seed=2))
    assert len(recorder.recordings) == 1 and pages.fills >= 2


def test_eviction_between_two_steps_is_noticed(paged, plain, sample):
    quantized, _recorder, pages = paged
    due = [False, True, False, False]
    clone = _after_each_step(quantized, lambda: due.pop(0) and pages.evict())
    assert torch.equal(sample(clone, steps=STEPS), sample(plain, steps=STEPS))
    assert state_of(quantized).runner.last_reason is None


def test_eviction_at_every_step_ends_the_holding(paged, plain, sample):
    quantized, _recorder, pages = paged
    clone = _after_each_step(quantized, pages.evict)
    assert torch.equal(sample(clone, steps=8), sample(plain, steps=8))
    assert state_of(quantized).runner.last_reason == EVICTED_TOO_OFTEN
    assert torch.equal(sample(quantized, steps=STEPS), sample(plain, steps=STEPS))


def test_weights_that_do_not_fit_run_eagerly(paged, plain, sample):
    quantized, recorder, pages = paged
    pages.fits = False
    assert torch.equal(sample(quantized, steps=STEPS), sample(plain, steps=STEPS))
    assert recorder.recordings == [] and state_of(quantized).runner.last_reason == DO_NOT_FIT


def test_small_tensors_that_every_load_makes_anew_cost_no_new_graph(paged, plain, sample):
    quantized, recorder, _pages = paged
    sample(quantized, steps=STEPS)
    for one, scale in ((quantized, 1.5), (plain, 1.5)):
        for module in one.model.diffusion_model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight = torch.nn.Parameter(module.weight * scale, requires_grad=False)
        state_of(one).weights_moved()
    assert torch.equal(sample(quantized, steps=STEPS), sample(plain, steps=STEPS))
    assert len(recorder.recordings) == 1


def test_pages_are_given_back_when_a_step_fails(paged, sample):
    quantized, _recorder, pages = paged

    def fail(*_):
        raise ValueError("stop")

    handle = quantized.model.diffusion_model.middle_block[0].register_forward_hook(fail)
    with pytest.raises(ValueError, match="stop"):
        sample(quantized)
    handle.remove()
    assert pages.pins == 0 and not state_of(quantized).runner.residency.lease.held


def test_held_weights_are_read_without_asking_comfyui(quantized, sample, monkeypatch):
    sample(quantized)
    residency, x = state_of(quantized).runner.residency, torch.randn(2, 64)
    layer = quantized.model.diffusion_model.input_blocks[4][1].transformer_blocks[0].attn1.to_q
    norm = quantized.model.diffusion_model.input_blocks[4][1].transformer_blocks[0].norm1
    expected = layer(norm(x))
    assert residency.hold(x) is None
    residency.lend()
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", None)
    assert torch.equal(layer(norm(x)), expected)
    residency.release()
    monkeypatch.undo()
    assert torch.equal(layer(norm(x)), expected)


def test_weight_that_moved_in_a_classic_load_is_in_the_key(quantized, plain, sample):
    recorder = use_fake_graphs(quantized)
    sample(quantized, steps=STEPS)
    _, module = next(quantized_layers(quantized.model))
    module.weight = torch.nn.Parameter(module.weight.clone(), requires_grad=False)
    assert torch.equal(sample(quantized, steps=STEPS), sample(plain, steps=STEPS))
    assert len(recorder.recordings) == 2 and len(recorder.live) == 1


def test_nothing_is_held_after_a_run_in_a_classic_load(quantized, sample):
    sample(quantized)
    assert not any("resident" in vars(module) for module in quantized.model.modules())


def test_partial_load_is_not_held(quantized):
    residency = state_of(quantized).runner.residency
    assert residency.hold(torch.zeros(1, device="meta")) == PARTLY_LOADED
    residency.invalidate()
    assert residency.hold(torch.zeros(1)) is None
    residency.release()


def test_edited_weights_are_not_held(quantized, plain, sample):
    recorder = use_fake_graphs(quantized)
    results = []
    for one in (quantized, plain):
        clone = one.clone()
        clone.add_weight_wrapper("diffusion_model.input_blocks.4.0.in_layers.2.weight", lambda weight: weight * 0.5)
        results.append(sample(clone, steps=STEPS))
    assert torch.equal(*results)
    assert recorder.recordings == [] and state_of(quantized).runner.last_reason == EDITED
