"""How ComfyUI holds and rebuilds a model: partial loads, copies for other devices, saves. torch.compile is in test_compiled.py."""

import comfy.sd
import comfy_extras.nodes_model_merging as merging
from sampling_run import sample_latent

from .subjects import another


def test_partial_load(contract, unet_call):
    def use(model):
        model.detach()
        model.load(model.load_device, lowvram_model_memory=2_000_000, full_load=False)
        try:
            return unet_call(model, (3.0, 0.5)).clone()
        finally:
            model.detach()

    contract("low VRAM, partial load", use)


def test_partial_load_with_a_lora(contract, unet_call, add_lora):
    def use(model):
        patched = add_lora(model)
        patched.detach()
        patched.load(patched.load_device, lowvram_model_memory=2_000_000, full_load=False)
        try:
            return unet_call(patched, (3.0, 0.5)).clone()
        finally:
            patched.detach()

    contract("low VRAM, partial load with a LoRA", use)


def test_rebuilt_model(contract):
    contract("model made again (multi-GPU, compile)", lambda model: sample_latent(another(model)), shows=False)


def test_stock_save(contract, tmp_path_factory):
    def use(model):
        folder = tmp_path_factory.mktemp("saved")
        merging.save_checkpoint(model, filename_prefix="stock", output_dir=str(folder))
        (path,) = folder.glob("*.safetensors")
        return sample_latent(comfy.sd.load_diffusion_model(str(path)))

    contract("Save Model (stock), opened again", use, shows=False)
