"""Export native: stock loaders open the file, and what they sample is our model within the noise of quantization."""

import comfy.sd
import pytest
import tiny_sdxl
import torch

from stepquant.errors import ModelError
from stepquant.hosts.comfy.export_native import export_native
from stepquant.hosts.comfy.lora import quantized_layers
from stepquant.hosts.comfy.quantize import quantize_model

# Activations are quantized in both, and convolutions in ours only; in this random UNet that grows to 7 % and 10 %.
SAME_MODEL = 0.2


def test_stock_loader_opens_it_with_the_same_codes(quantized, model, sample, relative_error, tmp_path):
    export_native(quantized, tmp_path / "native.safetensors")
    native = comfy.sd.load_diffusion_model(str(tmp_path / "native.safetensors"))
    assert relative_error(sample(native), sample(model)) < SAME_MODEL
    for key, layer in quantized_layers(quantized.model):
        weight = native.model.get_parameter(key)
        assert (type(weight).__name__ == "QuantizedTensor") == (weight.ndim == 2)
        assert torch.allclose(weight.dequantize().float() if weight.ndim == 2 else weight.float(), layer.weight.dequantize(), atol=1e-3)


def test_stock_checkpoint_loader_opens_a_whole_one(checkpoint_file, sample, relative_error, tmp_path):
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(checkpoint_file)
    export_native(quantize_model(model, "w8a8-token"), tmp_path / "whole.safetensors", clip, vae)
    native, clip_again, vae_again, _ = comfy.sd.load_checkpoint_guess_config(str(tmp_path / "whole.safetensors"))
    assert relative_error(sample(native), sample(model)) < SAME_MODEL
    assert torch.equal(clip_again.encode("a red fox"), clip.encode("a red fox"))
    assert torch.equal(vae_again.decode(torch.zeros(1, 4, 8, 8)), vae.decode(torch.zeros(1, 4, 8, 8)))


@pytest.mark.parametrize("whole", [False, True], ids=["unet", "checkpoint"])
def test_sampling_of_a_v_prediction_model_comes_along(checkpoint_file, tmp_path, whole):
    tiny_sdxl.write_unet(tmp_path / "v.safetensors", v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    model = comfy.sd.load_checkpoint_guess_config(str(tmp_path / "v.safetensors"), output_vae=False, output_clip=False)[0]
    parts = comfy.sd.load_checkpoint_guess_config(checkpoint_file)[1:3] if whole else ()
    export_native(quantize_model(model, "w8a8-token"), tmp_path / "native.safetensors", *parts)
    native = comfy.sd.load_checkpoint_guess_config(str(tmp_path / "native.safetensors"), output_vae=whole, output_clip=whole)[0]
    assert native.model.model_type == model.model.model_type
    assert torch.equal(native.model.model_sampling.sigmas, model.model.model_sampling.sigmas)


def test_loras_stay_out_and_are_counted(quantized, add_lora, tmp_path):
    assert export_native(add_lora(quantized), tmp_path / "native.safetensors").patches_left_out == 4


def test_a_model_that_is_not_quantized_is_refused(model, tmp_path):
    with pytest.raises(ModelError, match="not quantized"):
        export_native(model, tmp_path / "native.safetensors")
