"""The UNet as a CUDA graph: the same picture, a new recording whenever a replay would be wrong, and no recording where it cannot be.

On the CPU with recordings that run their work again; the real ones are in tests/gpu.
"""

import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy_extras.nodes_model_advanced as advanced
import pytest
import tiny_sdxl
import torch
from comfy.ldm.modules import attention
from fake_graph import use_fake_graphs

from stepquant.hosts.acceleration import Acceleration
from stepquant.hosts.comfy import graph_limits
from stepquant.hosts.comfy.attach import counting_macs, state_of
from stepquant.hosts.comfy.graph import LARGEST_NUMBER_OF_GRAPHS, describe_runners
from stepquant.hosts.comfy.graph_capture import Recording
from stepquant.hosts.comfy.quantize import quantize_model

STEPS = 4


@pytest.fixture
def plain(model):
    """The same quantized MODEL without a graph: what every result must equal."""
    return quantize_model(model, "w8a8-token", acceleration=Acceleration.FUSED)


def _run(patcher, batch=1, side=8, seed=0, control=None, **options):
    """One UNet call, as a sampler makes it."""
    generator = torch.Generator().manual_seed(seed)
    x, context = torch.randn(batch, 4, side, side, generator=generator), torch.randn(batch, 77, 128, generator=generator)
    patcher.patch_model(load_weights=False)
    patcher.pre_run()
    try:
        y = torch.zeros(batch, tiny_sdxl.CLIP_G + 1536)
        sigma = torch.full((batch,), 3.0 + seed)
        return patcher.model.apply_model(x, sigma, c_crossattn=context, y=y, control=control, transformer_options=options)
    finally:
        patcher.unpatch_model(unpatch_weights=False)


def test_graph_gives_the_same_picture_bit_for_bit(quantized, plain, sample):
    recorder = use_fake_graphs(quantized)
    assert torch.equal(sample(quantized, steps=STEPS), sample(plain, steps=STEPS))
    runner = state_of(quantized).runner
    assert (recorder.warm_ups, len(recorder.recordings), runner.replays, runner.last_reason) == (1, 1, STEPS - 1, None)


def test_graph_reads_every_input_anew(quantized, plain):
    use_fake_graphs(quantized)
    for seed in range(4):
        assert torch.equal(_run(quantized, seed=seed), _run(plain, seed=seed))


def test_graph_is_used_again_for_the_next_picture(quantized, plain, sample):
    recorder = use_fake_graphs(quantized)
    for seed in (1, 2):
        assert torch.equal(sample(quantized, steps=STEPS, seed=seed), sample(plain, steps=STEPS, seed=seed))
    assert len(recorder.recordings) == 1 and recorder.warm_ups == 1


def test_each_size_gets_a_graph_and_keeps_it(quantized, plain):
    recorder = use_fake_graphs(quantized)
    for seed in range(4):
        for batch, side in ((1, 8), (2, 8), (1, 16)):
            assert torch.equal(_run(quantized, batch, side, seed), _run(plain, batch, side, seed))
    assert len(recorder.recordings) == 3 and len(recorder.live) == 3


def test_a_size_that_comes_once_is_not_recorded(quantized):
    recorder = use_fake_graphs(quantized)
    _run(quantized)
    assert recorder.recordings == []


def test_number_of_graphs_is_bounded_and_the_oldest_goes_first(quantized):
    recorder = use_fake_graphs(quantized)
    sizes = range(1, LARGEST_NUMBER_OF_GRAPHS + 2)
    for batch in sizes:
        for seed in range(2):
            _run(quantized, batch, seed=seed)
    assert len(recorder.live) == LARGEST_NUMBER_OF_GRAPHS
    assert recorder.recordings[0].released and not recorder.recordings[1].released


def test_lora_is_in_the_key(quantized, plain, sample, add_lora):
    recorder = use_fake_graphs(quantized)
    for strength in (None, 1.0, 1.0, -0.7, None):
        ours, reference = (one if strength is None else add_lora(one, strength) for one in (quantized, plain))
        assert torch.equal(sample(ours, steps=STEPS), sample(reference, steps=STEPS))
    assert len(recorder.recordings) >= 4 and len(recorder.live) == 1


def test_control_has_a_graph_of_its_own_and_is_read_anew(quantized, plain):
    recorder = use_fake_graphs(quantized)
    for seed in range(4):
        residual = torch.randn(1, 128, 2, 2, generator=torch.Generator().manual_seed(seed))
        results = [_run(one, seed=seed, control={"input": [], "middle": [residual.clone()], "output": []}) for one in (quantized, plain)]
        assert torch.equal(*results)
        assert torch.equal(_run(quantized, seed=seed), _run(plain, seed=seed))
    assert len(recorder.live) == 2


def test_another_sampling_is_in_the_key(quantized, plain, sample):
    recorder = use_fake_graphs(quantized)
    sample(quantized, steps=STEPS)
    ours, reference = (advanced.ModelSamplingDiscrete().patch(one, "v_prediction", True)[0] for one in (quantized, plain))
    assert torch.equal(sample(ours, steps=STEPS), sample(reference, steps=STEPS))
    assert len(recorder.live) == 1 and len(recorder.recordings) == recorder.warm_ups == 2


def test_padding_mode_is_in_the_key(quantized, plain):
    recorder = use_fake_graphs(quantized)
    for mode in ("zeros", "circular", "zeros"):
        for one in (quantized, plain):
            convolution = one.model.diffusion_model.input_blocks[4][0].in_layers[2]
            convolution.padding_mode, convolution._reversed_padding_repeated_twice = mode, [1, 1, 1, 1]
        for seed in range(3):
            assert torch.equal(_run(quantized, seed=seed), _run(plain, seed=seed))
    assert len(recorder.recordings) == 2


def test_patch_runs_eagerly_and_is_named(quantized, plain, sample):
    recorder = use_fake_graphs(quantized)

    def patched(patcher):
        clone = patcher.clone()
        clone.set_model_attn1_patch(lambda q, k, v, options: (q * 0.5, k, v))
        return clone

    assert torch.equal(sample(patched(quantized), steps=STEPS), sample(patched(plain), steps=STEPS))
    assert recorder.recordings == [] and "attn1_patch" in state_of(quantized).runner.last_reason
    assert torch.equal(sample(quantized, steps=STEPS), sample(plain, steps=STEPS))
    assert len(recorder.recordings) == 1


def test_hook_lora_runs_eagerly_and_graphs_return_after_it(quantized, plain, sample):
    recorder = use_fake_graphs(quantized)
    hooks = [comfy.hooks.create_hook_lora(tiny_sdxl.lora_tensors(), strength, 0.0) for strength in (1.0, -0.5)]
    results = [sample(one, steps=STEPS, hooks=hooks[0], negative_hooks=hooks[1]) for one in (quantized, plain)]
    assert torch.equal(*results)
    assert recorder.recordings == [] and "hooks" in state_of(quantized).runner.last_reason
    assert torch.equal(sample(quantized, steps=STEPS), sample(plain, steps=STEPS))
    assert state_of(quantized).runner.last_reason is None


def test_forward_hook_of_another_pack_still_runs(quantized):
    recorder, seen = use_fake_graphs(quantized), []
    layer = quantized.model.diffusion_model.middle_block[1].proj_in
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    for seed in range(3):
        _run(quantized, seed=seed)
    assert len(seen) == 3 and recorder.recordings == []
    handle.remove()
    for seed in range(3):
        _run(quantized, seed=seed)
    assert len(seen) == 3 and len(recorder.recordings) == 1


def test_replaced_forward_still_runs(quantized):
    recorder, seen = use_fake_graphs(quantized), []
    layer = quantized.model.diffusion_model.middle_block[0].in_layers[2]
    layer.forward = lambda *arguments: seen.append(1) or type(layer).forward(layer, *arguments)
    for seed in range(3):
        _run(quantized, seed=seed)
    assert len(seen) == 3 and recorder.recordings == []
    assert "replaced" in state_of(quantized).runner.last_reason


def test_unknown_option_and_extra_input_run_eagerly(quantized):
    recorder = use_fake_graphs(quantized)
    for seed in range(3):
        _run(quantized, seed=seed, sliding_window={"size": 3})
    assert recorder.recordings == [] and "sliding_window" in state_of(quantized).runner.last_reason
    for seed in range(3):
        _run(quantized, seed=seed, patches={"attn1_patch": []})
    assert len(recorder.recordings) == 1


def test_wrapper_around_the_unet_runs_at_every_step(quantized, plain, sample):
    recorder, calls = use_fake_graphs(quantized), []
    wrapped = quantized.clone()
    wrapped.add_wrapper_with_key("diffusion_model", "test", lambda executor, *args, **kwargs: calls.append(1) or executor(*args, **kwargs))
    assert torch.equal(sample(wrapped, steps=STEPS), sample(plain, steps=STEPS))
    assert len(calls) == STEPS and len(recorder.recordings) == 1


def test_counting_sees_every_layer(quantized):
    recorder = use_fake_graphs(quantized)
    totals = []
    for seed in range(4):
        with counting_macs(quantized.model) as counter:
            _run(quantized, seed=seed)
        totals.append(counter.total)
        _run(quantized, seed=seed)
    assert len(set(totals)) == 1 and totals[0] > 0 and len(recorder.recordings) == 1


def test_failed_recording_runs_eagerly_and_is_not_tried_at_every_step(quantized, plain, sample):
    recorder = use_fake_graphs(quantized, RuntimeError("operation not permitted when stream is capturing"))
    assert torch.equal(sample(quantized, steps=STEPS), sample(plain, steps=STEPS))
    assert recorder.warm_ups == 1
    assert "not permitted" in state_of(quantized).runner.last_reason


def test_attention_of_another_pack_runs_eagerly_under_cuda_malloc_async(quantized, plain, sample, monkeypatch):
    recorder = use_fake_graphs(quantized)
    monkeypatch.setattr(graph_limits, "hides_addresses", lambda: True)
    sample(quantized, steps=STEPS)
    assert len(recorder.recordings) == 1
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_basic)
    assert torch.equal(sample(quantized, steps=STEPS), sample(plain, steps=STEPS))
    runner = state_of(quantized).runner
    assert "attention" in runner.last_reason and "--disable-cuda-malloc" in runner.last_reason and runner.replays == STEPS - 1


def test_nothing_computed_in_a_recording_outlives_it(quantized, sample):
    """cudaMallocAsync cannot free a recording's memory later."""
    recorder, scope, seen = use_fake_graphs(quantized), state_of(quantized).scope, []
    record = recorder.record

    def watched(work, output):
        work()
        seen.append((scope._embedding, scope._activated))
        return record(work, output)

    recorder.record = watched
    sample(quantized, steps=STEPS)
    assert seen == [(None, None)]


def test_running_out_of_memory_frees_the_graphs_and_goes_on(quantized, plain, sample):
    recorder = use_fake_graphs(quantized)
    sample(quantized, steps=STEPS)
    recorder.error = comfy.model_management.OOM_EXCEPTION("CUDA out of memory")
    results = [sample(one, steps=STEPS, batch=2) for one in (quantized, plain)]
    assert torch.equal(*results)
    assert recorder.live == [] and "VRAM" in state_of(quantized).runner.last_reason


def test_unloading_releases_the_graphs(quantized, sample):
    recorder = use_fake_graphs(quantized)
    first = sample(quantized, steps=STEPS)
    comfy.model_management.unload_all_models()
    assert len(recorder.recordings) == 1 and recorder.live == []
    assert torch.equal(sample(quantized, steps=STEPS), first)
    assert len(recorder.live) == 1


def test_deleting_a_clone_keeps_the_graphs(quantized, sample):
    recorder = use_fake_graphs(quantized)
    sample(quantized, steps=STEPS)
    quantized.clone().detach(unpatch_all=False)
    assert len(recorder.live) == 1


@pytest.mark.parametrize("acceleration", [Acceleration.FUSED, Acceleration.OFF], ids=lambda one: one.value)
def test_no_graph_is_recorded_when_none_is_asked_for(acceleration, model, plain, sample):
    quantized = quantize_model(model, "w8a8-token", acceleration=acceleration)
    if acceleration is Acceleration.OFF:
        assert state_of(quantized).runner is None and "_forward" not in vars(quantized.model.diffusion_model)
        return
    recorder = use_fake_graphs(quantized)
    assert torch.equal(sample(quantized, steps=STEPS), sample(plain, steps=STEPS))
    assert recorder.recordings == [] and "fused" in state_of(quantized).runner.last_reason


def test_acceleration_survives_a_rebuild(model):
    quantized = quantize_model(model, "w8a8-token", acceleration="fused")
    function, arguments = quantized.cached_patcher_init
    assert state_of(function(*arguments, disable_dynamic=True)).acceleration is Acceleration.FUSED


def test_cpu_says_why_there_is_no_graph(quantized, sample):
    sample(quantized)
    assert "NVIDIA" in state_of(quantized).runner.last_reason
    assert any("NVIDIA" in line for line in describe_runners())


def test_results_of_two_replays_are_two_tensors():
    class Graph:
        def replay(self):
            output.add_(1)

    output = torch.zeros(3)
    recording = Recording(Graph(), output, nbytes=0)
    first = recording.replay()
    second = recording.replay()
    assert first.tolist() == [1, 1, 1] and second.tolist() == [2, 2, 2]


def test_graph_is_back_after_a_bypass_lora(quantized, sample):
    """LoraLoaderBypass gives a layer its forward back as an attribute, which hides the fused blocks if it stays."""
    use_fake_graphs(quantized)
    runner = state_of(quantized).runner
    sample(comfy.sd.load_bypass_lora_for_models(quantized, None, tiny_sdxl.lora_tensors(), 1.0, 0)[0])
    assert "replaced a layer's forward" in runner.last_reason
    sample(quantized)
    before = runner.replays
    sample(quantized, steps=STEPS)
    assert runner.last_reason is None and runner.replays - before == STEPS
