"""Memory that runs out and cancels in the middle of quantizing: the source stays what it was, and the next try works."""

import comfy.model_management
import pytest
import torch
from sampling_run import sample_latent

from stepquant.hosts.comfy import quantize as host
from stepquant.hosts.comfy.quantize import quantize_model


class Cancelled(BaseException):
    """As ComfyUI's own, no Exception."""


@pytest.fixture(params=["out_of_memory", "cancelled"])
def interrupted(request, monkeypatch):
    """Quantizing stops at the tenth layer; returns what is raised."""
    error = comfy.model_management.OOM_EXCEPTION("CUDA out of memory") if request.param == "out_of_memory" else Cancelled()
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
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(sample_latent(model), picture)
    assert torch.isfinite(sample_latent(quantize_model(model, "w8a8-token"))).all()


def test_sampling_that_stops_leaves_the_quantized_model_as_it_was(quantized, add_lora):
    picture = sample_latent(quantized)
    patched = add_lora(quantized)

    def stops(executor, *args, **kwargs):
        executor(*args, **kwargs)
        raise Cancelled

    patched.add_wrapper_with_key("diffusion_model", "test", stops)
    with pytest.raises(Cancelled):
        sample_latent(patched)
    assert torch.equal(sample_latent(quantized), picture)
