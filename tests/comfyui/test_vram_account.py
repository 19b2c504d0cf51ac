"""What ComfyUI believes a quantized model to hold in VRAM: weights, LoRA branches, the prompts' keys and values, CUDA graphs."""

import pytest
from fake_graph import use_fake_graphs

from stepquant.hosts.comfy.attach import state_of
from stepquant.hosts.comfy.quantize import quantize_model


@pytest.fixture
def fused(model):
    return quantize_model(model, "w8a8-token", acceleration="fused")


def _weights(patcher) -> int:
    """Loaded, and nothing run yet."""
    patcher.detach()
    patcher.load(patcher.load_device, full_load=True)
    return patcher.loaded_size()


def test_keys_and_values_of_the_prompts_are_counted(fused, sample):
    weights = _weights(fused)
    sample(fused)
    assert fused.loaded_size() - weights == state_of(fused).kv_cache.nbytes > 0


def test_graphs_are_counted_until_they_are_dropped(model, sample, add_lora):
    patcher = quantize_model(model, "w8a8-token")
    weights, recorder, state = _weights(patcher), use_fake_graphs(patcher), state_of(patcher)
    sample(patcher, steps=4)
    graphs = sum(recording.nbytes for recording in recorder.live)
    assert graphs and patcher.loaded_size() - weights == graphs + state.kv_cache.nbytes
    sample(add_lora(patcher), steps=1)
    assert not recorder.live
    branches = sum(layer.branch.nbytes for layer in patcher.model.modules() if getattr(layer, "branch", None) is not None)
    assert patcher.loaded_size() - weights == branches + state.kv_cache.nbytes


def test_nothing_is_counted_twice(fused, sample, add_lora):
    weights = _weights(fused)
    sample(fused)
    once = fused.loaded_size()
    for _ in range(2):
        sample(fused)
        assert fused.loaded_size() == once
        sample(add_lora(fused))
    sample(fused)
    assert fused.loaded_size() - weights == state_of(fused).kv_cache.nbytes


def test_an_unloaded_model_holds_nothing(fused, sample):
    weights = _weights(fused)
    sample(fused)
    fused.detach()
    assert fused.loaded_size() == 0
    assert _weights(fused) == weights
