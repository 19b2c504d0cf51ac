"""LoRAs hooked to conditionings, in both of ComfyUI's hook modes: two groups take turns within a step and leave nothing behind."""

import comfy.hooks
import pytest
import tiny_sdxl
import torch


def _hooks(strength, seed=0):
    return comfy.hooks.create_hook_lora(lora=tiny_sdxl.lora_tensors(seed), strength_model=strength, strength_clip=0.0)


@pytest.mark.parametrize("mode", list(comfy.hooks.EnumHookMode), ids=lambda mode: mode.name)
def test_two_hook_groups_take_turns_and_leave_nothing(mode, weight_only, dequantized, sample, relative_error, snapshot):
    weight_only.set_hook_mode(mode)
    base, before = sample(weight_only), snapshot(weight_only)
    positive, negative = _hooks(1.0), _hooks(-0.7, seed=5)
    result = sample(weight_only, steps=3, hooks=positive, negative_hooks=negative)
    expected = sample(dequantized(weight_only), steps=3, hooks=positive, negative_hooks=negative)
    assert relative_error(result, expected) < 0.1
    assert torch.equal(sample(weight_only, steps=3, hooks=positive, negative_hooks=negative), result)
    assert torch.equal(sample(weight_only), base)
    after = snapshot(weight_only)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("mode", list(comfy.hooks.EnumHookMode), ids=lambda mode: mode.name)
def test_hooks_on_one_conditioning_only(mode, weight_only, sample):
    weight_only.set_hook_mode(mode)
    base = sample(weight_only)
    first = sample(weight_only, steps=3, hooks=_hooks(1.0))
    assert torch.isfinite(first).all() and not torch.equal(first, sample(weight_only, steps=3))
    assert torch.equal(sample(weight_only), base)


def test_hooks_together_with_a_lora_branch(weight_only, dequantized, sample, add_lora, relative_error):
    base = sample(weight_only)
    hooks = _hooks(0.5, seed=5)
    result = sample(add_lora(weight_only), hooks=hooks, negative_hooks=hooks)
    expected = sample(add_lora(dequantized(weight_only)), hooks=hooks, negative_hooks=hooks)
    assert relative_error(result, expected) < 0.1
    assert torch.equal(sample(weight_only), base)
