"""K and V of cross-attention are computed once per run, and never those of another prompt, order, area, LoRA or step."""

import copy

import comfy.conds
import comfy.hooks
import comfy.sample
import comfy.samplers
import pytest
import tiny_sdxl
import torch
from comfy.patcher_extension import WrappersMP
from fused_blocks import unet_call

from stepquant.hosts.comfy.attach import counting_macs
from stepquant.hosts.comfy.kv_cache import MOST_ENTRIES, OPTION, Conditionings, ConditioningWatch

WIDTH = tiny_sdxl.CLIP_L + tiny_sdxl.CLIP_G
TO_K = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"
STEPS = 4


def _tokens(seed: int, length: int = 77) -> torch.Tensor:
    return torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def _prompt(seed: int, length: int = 77, **entries) -> list:
    pooled = torch.randn(1, tiny_sdxl.CLIP_G, generator=torch.Generator().manual_seed(seed + 100))
    return [[_tokens(seed, length), {"pooled_output": pooled, **entries}]]


def _sample(patcher, positive=None, negative=None, side: int = 8, steps: int = STEPS, callback=None, guider=None) -> torch.Tensor:
    latent = torch.zeros(1, 4, side, side)
    noise = comfy.sample.prepare_noise(latent, 1)
    if guider is None:
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(positive or _prompt(11), negative or _prompt(12))
        guider.set_cfg(4.0)
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "normal", steps)
    return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, callback=callback, disable_pbar=True).float()


@pytest.fixture
def cache(quantized):
    return quantized.model.stepquant.kv_cache


@pytest.fixture
def uncached(quantized, monkeypatch):
    """Runs a function without the cache."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(quantized.model.stepquant.kv_cache, "open", lambda *_: None)
            return function()

    return run


@pytest.fixture
def projections(quantized):
    """How many rows of prompt tokens to_k was given while a function ran, in prompts of 77."""

    def run(function) -> tuple[torch.Tensor, float]:
        with counting_macs(quantized.model) as counter:
            result = function()
        layer = quantized.model.diffusion_model.get_submodule(TO_K)
        return result, counter.total_by_layer[TO_K] / (layer.weight.shape[0] * WIDTH * 77)

    return run


def test_k_and_v_are_computed_once_per_run(quantized, cache, uncached, projections):
    result, prompts = projections(lambda: _sample(quantized))
    expected, uncached_prompts = projections(lambda: uncached(lambda: _sample(quantized)))
    assert (prompts, uncached_prompts) == (2, 2 * STEPS)
    assert torch.equal(result, expected)
    assert cache.nbytes > 0


def test_same_prompt_twice_gives_the_same_picture(quantized, projections):
    first, prompts = projections(lambda: _sample(quantized))
    second, again = projections(lambda: _sample(quantized))
    assert torch.equal(first, second) and (prompts, again) == (2, 2)


@pytest.mark.parametrize(
    ("positive", "negative"),
    [(_prompt(21), _prompt(12)), (_prompt(12), _prompt(11)), (_prompt(21, 154), _prompt(12)), (_prompt(11) + _prompt(13), _prompt(12))],
    ids=["equal length", "swapped", "longer", "two"],
)
def test_changed_prompt_is_read_anew(quantized, uncached, positive, negative):
    _sample(quantized)
    changed = _sample(quantized, positive, negative)
    assert torch.equal(changed, uncached(lambda: _sample(quantized, positive, negative)))
    assert not torch.equal(changed, _sample(quantized))


def test_prompt_overwritten_in_place_between_runs_of_one_guider_is_read_anew(quantized, uncached):
    """ComfyUI keeps a guider, and with it the uuids of its conditionings, between runs."""
    guider = comfy.samplers.CFGGuider(quantized)
    positive = _prompt(11)
    guider.set_conds(positive, _prompt(12))
    guider.set_cfg(4.0)
    first = _sample(quantized, guider=guider)
    positive[0][0].copy_(_tokens(31))
    second = _sample(quantized, guider=guider)
    assert not torch.equal(first, second)
    assert torch.equal(second, uncached(lambda: _sample(quantized, guider=guider)))


def test_conditionings_that_run_apart_are_both_kept(quantized, uncached, projections, monkeypatch):
    monkeypatch.setattr(quantized.model, "memory_required", lambda *args, **kwargs: 1e30)
    result, prompts = projections(lambda: _sample(quantized))
    assert prompts == 2
    assert torch.equal(result, uncached(lambda: _sample(quantized)))


@pytest.mark.parametrize("area", [(8, 4, 0, 0), (8, 4, 0, 4), (4, 8, 2, 0)])
def test_areas_have_their_own_prompts(quantized, cache, uncached, area):
    def run():
        return _sample(quantized, _prompt(11) + _prompt(13, area=area, strength=1.0))

    _sample(quantized)
    result = run()
    assert torch.equal(result, uncached(run))
    assert len(cache._entries) <= MOST_ENTRIES


def test_an_area_that_is_completed_under_the_same_uuid_has_no_cache(quantized, uncached, projections):
    """ComfyUI gives an area that only the positive has to the negative too: the positive's name, the negative's prompt."""

    def run():
        return _sample(quantized, _prompt(11, area=(8, 4, 0, 0), strength=1.0), _prompt(12))

    result, prompts = projections(run)
    assert torch.equal(result, uncached(run))
    assert prompts >= 2 * STEPS


@pytest.mark.parametrize("kind", ["beside", "merged"])
def test_lora_on_the_projections_is_used_at_once(quantized, uncached, kind):
    key, generator = f"diffusion_model.{TO_K}.weight", torch.Generator().manual_seed(5)
    guider = comfy.samplers.CFGGuider(quantized)
    guider.set_conds(_prompt(11), _prompt(12))
    guider.set_cfg(4.0)
    plain = _sample(quantized, guider=guider)
    patched = quantized.clone()
    if kind == "beside":
        down, up = torch.randn(4, WIDTH, generator=generator) / 8, torch.randn(64, 4, generator=generator)
        from comfy.weight_adapter import LoRAAdapter

        patched.add_patches({key: LoRAAdapter(set(), (up, down, 4.0, None, None, None))})
    else:
        patched.add_patches({key: ("diff", (torch.randn(64, WIDTH, generator=generator) / 8,))})
    guider.model_patcher = patched  # the very same conditionings
    changed = _sample(patched, guider=guider)
    assert not torch.equal(changed, plain)
    assert torch.equal(changed, uncached(lambda: _sample(patched, guider=guider)))
    guider.model_patcher = quantized
    assert torch.equal(_sample(quantized, guider=guider), plain)


def _function_wrapper(patcher):
    def wrapper(apply_model, args):
        args["c"]["c_crossattn"] = args["c"]["c_crossattn"] * (1 + args["timestep"][0] / 10)
        return apply_model(args["input"], args["timestep"], **args["c"])

    patcher.set_model_unet_function_wrapper(wrapper)


def _pre_cfg(patcher):
    def exchange(args):
        entry = args["conds"][0][0]["model_conds"]
        entry["c_crossattn"] = comfy.conds.CONDCrossAttn(entry["c_crossattn"].cond * 1.1)
        return args["conds_out"]

    patcher.set_model_sampler_pre_cfg_function(exchange)


def _in_place(patcher):
    def overwrite(args):
        args["conds"][0][0]["model_conds"]["c_crossattn"].cond.mul_(1.1)
        return args["conds_out"]

    patcher.set_model_sampler_pre_cfg_function(overwrite)


def _calc_cond_batch(patcher):
    def calculate(args):
        conds = [[{**cond, "model_conds": dict(cond["model_conds"])} for cond in group] for group in args["conds"]]
        tokens = conds[0][0]["model_conds"]["c_crossattn"].cond
        conds[0][0]["model_conds"]["c_crossattn"] = comfy.conds.CONDCrossAttn(tokens * (1 + args["sigma"][0] / 10))
        return comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], args["model_options"])

    patcher.set_model_sampler_calc_cond_batch_function(calculate)


def _wrapper(kind, position):
    def apply(patcher):
        def wrapper(executor, *args, **kwargs):
            args = list(args)
            if kind == WrappersMP.CALC_COND_BATCH:
                args[1] = copy.copy(args[1])
                cond = args[1][0][0]
                tokens = cond["model_conds"]["c_crossattn"].cond * (1 + args[3][0] / 10)
                args[1][0] = [{**cond, "model_conds": {**cond["model_conds"], "c_crossattn": comfy.conds.CONDCrossAttn(tokens)}}]
            else:
                context = kwargs if "c_crossattn" in kwargs else args
                place = "c_crossattn" if context is kwargs else position
                context[place] = context[place] * (1 + args[1].reshape(-1)[0] / 1000)
            return executor(*args, **kwargs)

        patcher.add_wrapper_with_key(kind, "another pack", wrapper)

    return apply


def _attn2_patch(patcher):
    patcher.set_model_attn2_patch(lambda n, context, value, extra: (n, context * (1 + extra["sigmas"][0] / 10), value))


EDITS = {
    "function wrapper": _function_wrapper,
    "exchanged": _pre_cfg,
    "in place": _in_place,
    "own calc_cond_batch": _calc_cond_batch,
    "CALC_COND_BATCH": _wrapper(WrappersMP.CALC_COND_BATCH, None),
    "APPLY_MODEL": _wrapper(WrappersMP.APPLY_MODEL, 3),
    "DIFFUSION_MODEL": _wrapper(WrappersMP.DIFFUSION_MODEL, 2),
    "attn2_patch": _attn2_patch,
}


@pytest.mark.parametrize("edit", EDITS)
def test_conditioning_edited_at_every_step_is_read_at_every_step(quantized, uncached, edit):
    plain = _sample(quantized)
    patcher = quantized.clone()
    EDITS[edit](patcher)
    edited = _sample(patcher)
    assert not torch.equal(edited, plain)
    assert torch.equal(edited, uncached(lambda: _sample(patcher)))
    assert torch.equal(_sample(quantized), plain)


def test_prompts_of_different_steps_take_turns(quantized, uncached):
    def run():
        first = _prompt(11, start_percent=0.0, end_percent=0.5)
        return _sample(quantized, first + _prompt(13, start_percent=0.5, end_percent=1.0))

    assert torch.equal(run(), uncached(run))


def test_hooked_weights_have_no_cache(quantized, uncached, projections):
    hooks = comfy.hooks.create_hook_lora(lora=tiny_sdxl.lora_tensors(0), strength_model=1.0, strength_clip=0.0)

    def run():
        return _sample(quantized, _prompt(11, hooks=hooks), _prompt(12))

    result, prompts = projections(run)
    assert prompts == 2 * STEPS
    assert torch.equal(result, uncached(run))


def test_a_hook_on_a_projection_is_called_at_every_step(quantized):
    seen = []
    layer = quantized.model.diffusion_model.get_submodule(TO_K)
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    _sample(quantized)
    handle.remove()
    assert len(seen) == STEPS


def _noted(uuids, revisions=None):
    return {OPTION: Conditionings(dict(zip(uuids, revisions or range(1, 9), strict=False)), 0), "uuids": uuids, "cond_or_uncond": [0, 1]}


def test_calls_without_a_known_origin_have_no_cache(quantized, cache):
    unet_call(quantized)  # loads the model; a direct call has no uuids
    assert not cache.nbytes
    context = torch.cat([_tokens(1), _tokens(2)])
    for options in (
        {},
        {"uuids": ["a", "b"], "cond_or_uncond": [0, 1]},
        {**_noted(["a", "b"]), "uuids": ["a", "c"]},
        {**_noted(["a", "b"]), "uuids": None},
        {**_noted(["a", "b"]), "patches": {"attn2_patch": [None]}},
        {**_noted(["a", "b"]), "patches_replace": {"attn2": {("middle", 0): None}}},
        {**_noted(["a", "b"]), "wrappers": {WrappersMP.DIFFUSION_MODEL: {"other": [None]}}},
    ):
        assert cache.open(options, context) is None and cache.lookup(TO_K.removesuffix(".to_k")) is None
    assert cache.open(_noted(["a", "b"]), None) is None
    assert not cache.nbytes


def test_buffers_are_refilled_in_place_while_their_shape_stays(quantized, cache):
    unet_call(quantized)
    name, context = TO_K.removesuffix(".to_k"), torch.cat([_tokens(1), _tokens(2)])
    layer = quantized.model.diffusion_model.get_submodule(name)
    first = cache.open(_noted(["a", "b"]), context)
    k, v = cache.lookup(name)
    assert torch.equal(k, layer.to_k(context)) and torch.equal(v, layer.to_v(context))
    second = cache.open(_noted(["c", "d"], (5, 6)), context.flip(0))
    assert second == first and cache.lookup(name)[0] is k
    assert torch.equal(k, layer.to_k(context.flip(0)))
    third = cache.open(_noted(["c", "d"], (5, 6)), context[:1])
    assert third != first and cache.lookup(name)[0].shape[0] == 1
    cache.close()
    assert cache.lookup(name) is None


def test_an_interrupted_filling_is_not_used(quantized, cache, monkeypatch):
    unet_call(quantized)
    context = torch.cat([_tokens(1), _tokens(2)])
    name = list(cache._layers)[-1]
    with monkeypatch.context() as patch:
        patch.setattr(cache._layers[name].to_v, "weight_function", [lambda weight: 1 / 0])
        with pytest.raises(ZeroDivisionError):
            cache.open(_noted(["a", "b"]), context)
    assert cache.lookup(name) is None
    cache.open(_noted(["a", "b"]), context)
    assert torch.equal(cache.lookup(name)[1], cache._layers[name].to_v(context))


def test_memory_is_bounded_and_freed_with_the_model(quantized, cache):
    _sample(quantized)
    one = cache.nbytes
    for seed in range(3):
        _sample(quantized, _prompt(seed) + _prompt(seed + 40, area=(8, 4, 0, 0)), side=8)
    assert len(cache._entries) <= MOST_ENTRIES and cache.nbytes <= 2 * MOST_ENTRIES * one
    quantized.detach()
    assert cache.nbytes == 0


def _cond(uuid, tokens, **entries):
    return {"uuid": uuid, "model_conds": {"c_crossattn": comfy.conds.CONDCrossAttn(tokens)}, **entries}


def test_watch_gives_equal_revisions_to_equal_contents_only():
    watch, tokens, other = ConditioningWatch(), _tokens(1), _tokens(2)
    conds = [[_cond("a", tokens)], [_cond("b", other)]]
    first = watch.number(conds, {})
    assert watch.number(conds, {}) == first and len(set(first.values())) == 2
    assert watch.number([conds[0], None], {}) == {"a": first["a"]}
    assert watch.number([[_cond("a", tokens.clone())]], {})["a"] != first["a"]  # another tensor, and who knows whose
    tokens[0, 0, 0] += 1
    assert watch.number(conds, {})["a"] not in (first["a"], None)
    assert watch.number([[_cond("a", tokens)], [_cond("a", other)]], {}) is None
    assert watch.number([[_cond("a", tokens, hooks=object())]], {}) is None
    assert watch.number(conds, {"model_function_wrapper": None}) is None
