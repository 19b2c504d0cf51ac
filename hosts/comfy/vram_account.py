"""Tells ComfyUI of the VRAM that a quantized model holds besides its weights: LoRA branches, prompt caches, CUDA graphs. Frees none."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from .lora import quantized_layers


def held_bytes(patcher: ModelPatcher) -> int:
    """VRAM of branches, keys and values of the prompts, and graphs, of a quantized MODEL."""
    state = patcher.model.stepquant
    branches = sum(layer.branch.nbytes for _, layer in quantized_layers(patcher.model) if layer.branch is not None)
    caches = 0 if state.kv_cache is None else state.kv_cache.nbytes
    graphs = 0 if state.runner is None else state.runner.nbytes
    return branches + caches + graphs


def start_count(patcher: ModelPatcher) -> None:
    """ON_LOAD: ComfyUI has just counted the weights anew, and nothing else."""
    patcher.model.stepquant.counted_bytes = 0
    renew_count(patcher)


def renew_count(patcher: ModelPatcher) -> None:
    """ON_CLEANUP: caches and graphs are made during a run. What `loaded_size()` says decides what ComfyUI unloads for others."""
    state, held = patcher.model.stepquant, held_bytes(patcher)
    known = patcher.model.model_loaded_weight_memory
    # Dynamic VRAM may have forgotten what was counted, when it gave up its own small weights.
    patcher.model.model_loaded_weight_memory = max(held, known + held - state.counted_bytes)
    state.counted_bytes = held


def end_count(patcher: ModelPatcher, unpatch_all: bool) -> None:
    """ON_DETACH: unloaded; ComfyUI counts from zero."""
    if unpatch_all:
        patcher.model.stepquant.counted_bytes = 0
