"""Layers whose input leaves its calibrated range: counted on the way, dynamic scales for the rest of the run, said once."""

from dataclasses import replace

import comfy.sd
import pytest
import torch
from fake_graph import use_fake_graphs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sampling_run import conditioning

from stepquant.hosts.acceleration import Acceleration
from stepquant.hosts.comfy import saturation
from stepquant.hosts.comfy.attach import state_of
from stepquant.hosts.comfy.calibrate import calibrate
from stepquant.hosts.comfy.compare import compare_models
from stepquant.hosts.comfy.loader import load_quantized
from stepquant.hosts.comfy.quantize import quantizable_layers, quantize_model
from stepquant.hosts.comfy.sampling import SamplerSettings
from stepquant.hosts.comfy.save import save_quantized
from stepquant.quant.recipe import preset_recipe
from stepquant.quant.saturation import DEFAULT_LIMIT
from stepquant.quant.scheme import ActivationMode, Scheme

CONV, SECOND = "input_blocks.4.0.in_layers.2", "middle_block.1.transformer_blocks.0.ff.net.2"
OWN = [f"input_blocks.4.1.transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_k", "to_v")]
STEPS = 5


@pytest.fixture(scope="module")
def static_file(unet_file, tmp_path_factory):
    """A static model calibrated on what `sample` asks for, with one conv in channel groups."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(unet_file)
        settings = SamplerSettings(steps=STEPS, cfg=4.0, sampler_name="euler", scheduler="normal")
        latent = {"samples": torch.zeros(1, 4, 8, 8)}
        calibration = calibrate(model, conditioning(11), conditioning(12), latent, 1, settings)
        recipe = preset_recipe("w8a8-static", quantizable_layers(model), 4)
        grouped = Scheme(activation=ActivationMode.CHANNEL_GROUP, symmetric=False, channel_groups=2, granularity=8)
        recipe = replace(recipe, schemes={**recipe.schemes, CONV: grouped})
        path = tmp_path_factory.mktemp("models") / "static.safetensors"
        save_quantized(quantize_model(model, recipe, calibration), path)
    torch.set_num_threads(threads)
    return path


@pytest.fixture
def narrowed(static_file, tmp_path):
    """The model with some layers' ranges cut to a tenth, as if their inputs had grown."""

    def make(*layers, limit=DEFAULT_LIMIT, acceleration=Acceleration.FUSED):
        with safe_open(str(static_file), "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(static_file)
        for name in layers:
            tensors[f"model.diffusion_model.{name}.act_scale"] /= 10
        metadata["stepquant"] = metadata["stepquant"].replace(f'"saturation_limit": {DEFAULT_LIMIT}', f'"saturation_limit": {limit}')
        path = tmp_path / f"narrowed_{len(list(tmp_path.iterdir()))}.safetensors"  # an open model may map its file
        save_file(tensors, path, metadata)
        return load_quantized(path, acceleration=acceleration).model

    return make


def switched_by_step(patcher) -> tuple:
    """A clone that notes after each UNet call which layers are switched, and the list it notes in."""
    seen, clone = [], patcher.clone()
    layers = {name: patcher.model.diffusion_model.get_submodule(name) for name in (CONV, SECOND, *OWN)}

    def wrapper(executor, *args, **kwargs):
        result = executor(*args, **kwargs)
        seen.append({name for name, layer in layers.items() if layer.saturation is not None and layer.saturation.switched})
        return result

    clone.add_wrapper_with_key("apply_model", "test", wrapper)
    return clone, seen


def messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "calibrated range" in record.getMessage()]


def test_calibrated_run_is_the_same_with_and_without_the_guard(narrowed, sample, caplog):
    watched, unwatched = narrowed(), narrowed(limit=1)
    assert state_of(watched).saturation.watches and not state_of(unwatched).saturation.watches
    assert torch.equal(sample(watched, steps=STEPS), sample(unwatched, steps=STEPS))
    assert not messages(caplog)


@pytest.mark.parametrize("acceleration", [Acceleration.FUSED, Acceleration.OFF], ids=["fused", "layer_by_layer"])
@pytest.mark.parametrize("name", [CONV, SECOND], ids=["channel_groups", "static"])
def test_clipped_layer_measures_its_input_from_the_next_step_on(name, acceleration, narrowed, sample, caplog, relative_error):
    patcher = narrowed(name, acceleration=acceleration)
    layer = patcher.model.diffusion_model.get_submodule(name)
    scales = layer.act_scale.clone()
    clone, seen = switched_by_step(patcher)
    result = sample(clone, steps=STEPS)
    assert seen == [set()] + [{name}] * (STEPS - 1)
    (said,) = messages(caplog)
    assert "left the calibrated range and ran on scales measured in each step" in said and f"{name} from step 2" in said
    assert not layer.saturation.switched and torch.equal(layer.act_scale, scales)
    assert torch.equal(sample(clone, steps=STEPS), result), "the next run begins with the stored scales"
    x = 20 * torch.randn(2, *((32, 8, 8) if name == CONV else (16, 512)), generator=torch.Generator().manual_seed(0))
    clipped, exact = layer(x), layer._float(x, layer.weight.dequantize(), layer.bias)
    layer.saturation.switched = True
    assert relative_error(layer(x), exact) < 0.02 < relative_error(clipped, exact)


def test_layers_that_share_a_quantization_switch_together(narrowed, sample, caplog):
    patcher = narrowed(*OWN)
    clone, seen = switched_by_step(patcher)
    sample(clone, steps=STEPS)
    assert seen[0] == set() and seen[1] == set(OWN)
    (said,) = messages(caplog)
    assert "3 layers left" in said and ", ".join(OWN) in said


def test_limit_decides_and_is_kept_in_the_file(narrowed, sample, caplog):
    patcher = narrowed(SECOND, limit=0.999)
    assert state_of(patcher).recipe.saturation_limit == 0.999
    sample(patcher, steps=STEPS)
    assert not messages(caplog)


def test_switching_a_layer_makes_another_graph_and_the_next_run_reuses_both(narrowed, sample):
    expected = sample(narrowed(SECOND), steps=STEPS)
    patcher = narrowed(SECOND, acceleration=Acceleration.AUTO)
    recorder = use_fake_graphs(patcher)
    assert torch.equal(sample(patcher, steps=STEPS), expected)
    assert (recorder.warm_ups, len(recorder.recordings)) == (2, 1)  # step 1; step 2 on dynamic scales, recorded in step 3
    assert torch.equal(sample(patcher, steps=STEPS), expected)
    assert (recorder.warm_ups, len(recorder.recordings), len(recorder.live)) == (2, 2, 2)
    assert torch.equal(sample(patcher, steps=STEPS), expected)
    assert len(recorder.recordings) == 2


def test_cancelled_run_leaves_no_layer_switched(narrowed, sample):
    patcher = narrowed(SECOND)
    clone, calls = patcher.clone(), []

    def cancel(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return executor(*args, **kwargs)

    clone.add_wrapper_with_key("apply_model", "test", cancel)
    with pytest.raises(KeyboardInterrupt):
        sample(clone, steps=STEPS)
    assert not patcher.model.diffusion_model.get_submodule(SECOND).saturation.switched
    assert state_of(patcher).saturation.key[1] == ()


class LateEvent:
    """A copy to the host that has arrived once it was asked for so many times."""

    def __init__(self, late):
        self.late, self.records = late, 0

    def query(self):
        self.late -= 1
        return self.late < 0

    def record(self, stream):
        self.records += 1


def test_counts_that_arrive_late_are_looked_at_late_and_lose_nothing(narrowed, monkeypatch):
    monkeypatch.setattr(saturation.torch.cuda, "current_stream", lambda device: None)
    patcher = narrowed(SECOND)
    guard, slot = state_of(patcher).saturation, patcher.model.diffusion_model.get_submodule(SECOND).saturation
    guard.begin_run()
    guard.before_step(torch.device("cpu"))
    guard._event = event = LateEvent(3)
    slot.counters += torch.tensor([0, 10], dtype=torch.int32)
    guard.after_step()
    for _ in range(2):  # not there yet: nothing is copied over it, nothing is cleared
        slot.counters += torch.tensor([slot.inputs, 10], dtype=torch.int32)
        guard.before_step(torch.device("cpu"))
        assert not slot.switched and event.records == 1
    guard.after_step()
    assert not slot.switched and event.records == 1 and slot.counters.tolist() == [2 * slot.inputs, 20]
    guard.before_step(torch.device("cpu"))
    assert not slot.switched, "the first step clipped nothing"
    guard.after_step()
    assert event.records == 2 and slot.counters.tolist() == [0, 0]
    guard.before_step(torch.device("cpu"))
    assert slot.switched and guard.key[1]


def test_unloading_frees_the_counters(narrowed, sample):
    patcher = narrowed()
    sample(patcher, steps=2)
    slot = patcher.model.diffusion_model.get_submodule(SECOND).saturation
    assert slot.counters.data_ptr() % 16 == 0
    patcher.detach()
    assert slot.counters is None and state_of(patcher).saturation.tensors() == ()
    sample(patcher, steps=2)
    assert slot.counters is not None


def test_collected_runs_are_what_was_said(narrowed, sample, caplog):
    patcher = narrowed(SECOND)
    with state_of(patcher).saturation.collected() as runs:
        sample(patcher, steps=STEPS)
        sample(narrowed(), steps=STEPS)
    assert len(runs) == 1 and SECOND in runs[0] and runs[0] in messages(caplog)[0]


def test_compare_reports_which_layers_switched(model, narrowed):
    settings = SamplerSettings(steps=3, cfg=4.0, sampler_name="euler", scheduler="normal")
    arguments = (conditioning(11), conditioning(12), {"samples": torch.zeros(1, 4, 8, 8)}, 1, settings)
    lines = compare_models(model, narrowed(SECOND), PixelVae(), *arguments).lines()
    assert lines[-1].startswith(
        f"Saturation: 1 layer left the calibrated range and ran on scales measured in each step: {SECOND} from step 2"
    )
    assert compare_models(model, narrowed(), PixelVae(), *arguments).lines()[-1] == "Saturation: no static layer left its calibrated range"
    assert not any(
        "Saturation" in line for line in compare_models(model, quantize_model(model, "w8a8-token"), PixelVae(), *arguments).lines()
    )


class PixelVae:
    def decode(self, latents):
        return (latents[:, :3] / 8 + 0.5).movedim(1, -1)
