"""Memory that runs out and cancels in the middle of calibrating, quantizing, sampling and saving: all stays as it was."""

import comfy.model_management
import pytest
import torch
from sampling_run import conditioning, sample_latent

from stepquant.hosts.comfy import quantize as host
from stepquant.hosts.comfy.calibrate import calibrate
from stepquant.hosts.comfy.quantize import quantize_model
from stepquant.hosts.comfy.sampling import SamplerSettings
from stepquant.hosts.comfy.save import save_quantized
from stepquant.quant import atomic_file

from .subjects import is_same


class Cancelled(BaseException):
    """As ComfyUI's own, no Exception."""


@pytest.fixture(params=["out_of_memory", "cancelled"])
def error(request):
    return comfy.model_management.OOM_EXCEPTION("CUDA out of memory") if request.param == "out_of_memory" else Cancelled()


@pytest.fixture
def interrupted(error, monkeypatch):
    """Quantizing stops at the tenth layer; returns what is raised."""
    calls, original = [], host.quantize_layer

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == 10:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(host, "quantize_layer", stops)
    return type(error)


def test_quantizing_that_stops_leaves_the_source_as_it_was(interrupted, model, snapshot):
    before, picture = snapshot(model), sample_latent(model)
    with pytest.raises(interrupted):
        quantize_model(model, "w8a8-token")
    after = snapshot(model)
    assert all(torch.equal(before[name].cpu(), after[name].cpu()) for name in before)  # the small ones may be on the GPU now
    assert is_same(sample_latent(model), picture)
    assert torch.isfinite(sample_latent(quantize_model(model, "w8a8-token"))).all()


def _stopping(model, error):
    """The model, which does its first UNet call and raises."""
    patched = model.clone()

    def stops(executor, *args, **kwargs):
        executor(*args, **kwargs)
        raise error

    patched.add_wrapper_with_key("diffusion_model", "test", stops)
    return patched


def test_calibrating_that_stops_leaves_no_observer_behind(error, model):
    picture = sample_latent(model)
    latent, settings = {"samples": torch.zeros(1, 4, 8, 8)}, SamplerSettings(2, 4.0, "euler", "normal")
    given = (conditioning(11), conditioning(12), latent, 1, settings)
    with pytest.raises(type(error)):
        calibrate(_stopping(model, error), *given)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())
    assert is_same(sample_latent(model), picture)
    assert calibrate(model, *given).layers


def test_sampling_that_stops_leaves_the_quantized_model_as_it_was(error, quantized, add_lora):
    picture = sample_latent(quantized)
    with pytest.raises(type(error)):
        sample_latent(_stopping(add_lora(quantized), error))
    assert is_same(sample_latent(quantized), picture)


def test_saving_that_stops_keeps_the_old_file_and_the_model(error, quantized, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_quantized(quantized, path)
    before, picture = path.read_bytes(), sample_latent(quantized)

    def stops(tensors, file, **_kwargs):
        with open(file, "wb") as half:
            half.write(b"half of it")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(atomic_file, "save_file", stops)
        with pytest.raises(type(error)):
            save_quantized(quantized, path)
    assert [one.name for one in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before
    assert is_same(sample_latent(quantized), picture)
