"""The timestep tap, read back inside real UNet calls: every sampling type, mixed timesteps, several models."""

import comfy.model_sampling
import comfy_extras.nodes_model_advanced as advanced
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

from stepquant.hosts.comfy.attach import state_of
from stepquant.hosts.comfy.quantize import quantize_model
from stepquant.hosts.comfy.tap import TimestepTap, recover_timestep
from stepquant.quant.timestep import sigma_to_timestep, timestep_bucket

SIGMAS = (14.0, 7.3, 2.9, 1.0, 0.31, 0.06)


def _with_sampling(model, kind):
    if kind in ("eps", "lcm", "v_prediction"):
        return advanced.ModelSamplingDiscrete().patch(model, kind, kind == "v_prediction")[0]
    return advanced.ModelSamplingContinuousEDM().patch(model, kind, 80.0, 0.002)[0]


def _buckets(unet_call, patcher, sigmas):
    unet_call(patcher, sigmas)
    return state_of(patcher).tap.bucket


@pytest.mark.parametrize("kind", ["eps", "v_prediction", "lcm", "edm", "edm_playground_v2.5", "cosmos_rflow"])
def test_tap_follows_each_sampling_for_a_batch_of_mixed_timesteps(kind, quantized, unet_call):
    patcher = _with_sampling(quantized, kind)
    sampling = patcher.get_model_object("model_sampling")
    # What the UNet really is given: discrete samplings round to the timesteps that they have.
    given = torch.stack([sampling.sigma(sampling.timestep(torch.tensor(sigma))).float() for sigma in SIGMAS])
    expected = timestep_bucket(sigma_to_timestep(given))
    assert (_buckets(unet_call, patcher, SIGMAS) - expected).abs().max() <= (0 if kind in ("eps", "v_prediction", "lcm") else 1)
    assert len(set(expected.tolist())) >= 5


def test_tap_changes_back_when_the_sampling_node_is_gone(quantized, unet_call):
    plain = _buckets(unet_call, quantized, SIGMAS).clone()
    followed = _buckets(unet_call, _with_sampling(quantized, "edm"), SIGMAS)
    assert (followed - plain).abs().max() <= 1  # another unit, the same noise levels
    assert torch.equal(_buckets(unet_call, quantized, SIGMAS), plain)


def test_tap_updates_one_tensor_in_place_while_the_batch_stays(quantized, unet_call):
    first = _buckets(unet_call, quantized, (14.0, 1.0))
    assert _buckets(unet_call, quantized, (0.1, 5.0)) is first
    assert _buckets(unet_call, quantized, (0.1, 5.0, 9.0)).shape == (3,)


def test_models_do_not_share_a_tap(model, quantized, unet_call):
    other = quantize_model(model, "w8a8-token")
    kept = _buckets(unet_call, quantized, (14.0,)).clone()
    unet_call(other, (0.05,))
    assert torch.equal(state_of(quantized).tap.bucket, kept)


def test_all_layers_of_a_model_read_the_same_tap(quantized):
    taps = {id(module.tap) for module in quantized.model.modules() if hasattr(module, "tap")}
    assert taps == {id(state_of(quantized).tap)}


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 0.01), (torch.float16, 0.2), (torch.bfloat16, 3.0)], ids=str)
@pytest.mark.parametrize("channels", [32, 320])
def test_timestep_is_read_back_from_the_embedding(dtype, error, channels):
    timesteps = torch.arange(1000.0)
    embedding = timestep_embedding(timesteps, channels).to(dtype)
    assert (recover_timestep(embedding) - timesteps).abs().max() < error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bucket_is_exact_on_the_base_schedule(dtype):
    tap, timesteps = TimestepTap(), torch.arange(1000.0)
    tap.follow(comfy.model_sampling.ModelSamplingDiscrete())
    tap.observe(timestep_embedding(timesteps, 320).to(dtype))
    assert torch.equal(tap.bucket, timestep_bucket(timesteps))


def test_tap_works_inside_and_outside_of_inference_mode():
    tap = TimestepTap()
    tap.follow(comfy.model_sampling.ModelSamplingDiscrete())
    embedding = timestep_embedding(torch.tensor([500.0]), 320)
    tap.observe(embedding)
    with torch.inference_mode(False), torch.no_grad():
        tap.observe(embedding.clone())
    assert tap.bucket.tolist() == [32]


def test_flow_sampling_is_followed_too():
    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    tap = TimestepTap()
    tap.follow(Flow())
    tap.observe(timestep_embedding(torch.tensor([999.0, 200.0]), 320))
    assert tap.bucket[0] > tap.bucket[1]


def test_compiled_layer_follows_the_bucket_without_recompiling(quantized, unet_call):
    tap = state_of(quantized).tap
    unet_call(quantized, (14.0,))
    table = torch.arange(64.0)

    def read(x):
        return x * table.index_select(0, tap.bucket)

    compiled = torch.compile(read, backend="eager", fullgraph=True)
    with torch.inference_mode(False):
        x = torch.ones(1)
        first = compiled(x)
        tap.bucket.fill_(3)
        assert compiled(x).item() == 3.0 != first.item()
