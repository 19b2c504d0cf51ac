"""LoRAs hooked to a prompt or scheduled over the steps: ComfyUI patches and restores weights in the middle of a step."""

import comfy.hooks
import pytest
import tiny_sdxl
from sampling_run import sample_latent


def _hook(strength: float, seed: int = 0, keyframes=()) -> comfy.hooks.HookGroup:
    hooks = comfy.hooks.create_hook_lora(tiny_sdxl.lora_tensors(seed), strength, 0.0)
    if keyframes:
        group = comfy.hooks.HookKeyframeGroup()
        for start, factor in keyframes:
            group.add(comfy.hooks.HookKeyframe(factor, start))
        hooks.set_keyframes_on_hooks(group)
    return hooks


@pytest.mark.parametrize("hook_mode", list(comfy.hooks.EnumHookMode), ids=lambda one: one.name)
def test_hook_loras(contract, hook_mode):
    def use(model):
        hooked = model.clone()
        hooked.set_hook_mode(hook_mode)
        return sample_latent(hooked, hooks=_hook(1.0), negative_hooks=_hook(-0.7, seed=5))

    contract(f"hook LoRAs, one per prompt ({hook_mode.name})", use)


def test_hook_on_one_prompt_only(contract):
    contract("hook LoRA on one prompt", lambda model: sample_latent(model, hooks=_hook(1.0)))


def test_scheduled_lora(contract):
    def use(model):
        return sample_latent(model, steps=4, hooks=_hook(1.0, keyframes=[(0.0, 0.0), (0.3, 1.0), (0.7, 0.5)]))

    contract("scheduled LoRA (hook keyframes)", use)


def test_hook_lora_over_a_stock_lora(contract, add_lora):
    contract("hook LoRA over LoraLoader", lambda model: sample_latent(add_lora(model, only="input_blocks"), hooks=_hook(0.7, seed=5)))
