"""ComfyUI's own save nodes on a quantized MODEL: a float file that a stock ComfyUI opens."""

import comfy.sd
import comfy_extras.nodes_model_merging as merging
import pytest
import torch
from safetensors.torch import load_file

TO_Q = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture
def save_stock(tmp_path):
    """ModelSave, with the folder as its argument; returns the one file it wrote."""

    def save(model, clip=None, vae=None):
        merging.save_checkpoint(model, clip=clip, vae=vae, filename_prefix="stock", output_dir=str(tmp_path))
        (path,) = tmp_path.glob("stock*.safetensors")
        return path

    return save


def test_stock_save_writes_what_the_stock_loader_opens(weight_only, sample, save_stock, relative_error):
    path = save_stock(weight_only)
    tensors = load_file(path)
    assert tensors[TO_Q].dtype == torch.float16
    assert not any(key.endswith(("qweight", "weight_scale", "act_scale")) for key in tensors)
    reloaded = comfy.sd.load_diffusion_model(str(path))
    assert relative_error(sample(reloaded), sample(weight_only)) < 0.02  # fp16 rounding of the weights, amplified


@pytest.mark.parametrize("loaded", ["loaded", "partly_loaded", "not_loaded"])
def test_stock_save_bakes_the_lora_in(weight_only, dequantized, sample, add_lora, save_stock, loaded):
    plain, with_lora = dequantized(weight_only), add_lora(weight_only)
    if loaded != "not_loaded":
        sample(with_lora)
    if loaded == "partly_loaded":
        with_lora.detach()
        with_lora.load(torch.device("cpu"), lowvram_model_memory=2_000_000, full_load=False)
    key = TO_Q.removeprefix("model.")
    expected = add_lora(plain).patch_weight_to_device(key, return_weight=True)
    assert torch.allclose(load_file(save_stock(with_lora))[TO_Q].float(), expected.float(), atol=1e-3)
    assert not torch.allclose(plain.model.get_parameter(key), expected.float(), atol=1e-2)


def test_stock_save_after_a_lora_was_taken_off_writes_the_base(weight_only, sample, add_lora, save_stock):
    sample(add_lora(weight_only))
    expected = weight_only.model.get_parameter(TO_Q.removeprefix("model.")).dequantize()
    assert torch.equal(load_file(save_stock(weight_only))[TO_Q], expected.half())


def test_checkpoint_save_holds_clip_and_vae(checkpoint_file, save_stock, sample):
    from stepquant.hosts.comfy.quantize import quantize_model

    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(checkpoint_file)
    path = save_stock(quantize_model(model, "w8a8-token"), clip, vae)
    again, clip_again, vae_again, _ = comfy.sd.load_checkpoint_guess_config(str(path))
    assert torch.isfinite(sample(again)).all()
    assert torch.allclose(clip_again.encode("a red fox"), clip.encode("a red fox"), atol=1e-3)
    assert vae_again is not None


def test_extracting_a_lora_gets_floats(weight_only):
    # comfy_extras' LoraSave and others ask for one weight at a time, as it is with all patches.
    key = TO_Q.removeprefix("model.")
    patched = weight_only.clone()
    patched.add_patches({key: ("diff", (torch.full((64, 64), 0.5),))})
    weight = patched.patch_weight_to_device(key, return_weight=True)
    assert type(weight) is torch.Tensor
    assert torch.allclose(weight, weight_only.model.get_parameter(key).dequantize() + 0.5, atol=1e-4)
