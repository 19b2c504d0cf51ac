"""SDXL's CLIP in 8 bit: conditioning near the 16-bit one's, half the memory, LoRA, made again without dynamic VRAM; refusals."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import comfy.sd
import pytest
import torch
from safetensors.torch import load_file

from stepquant.errors import FormatError, ModelError
from stepquant.hosts.comfy.save import save_quantized
from stepquant.hosts.comfy.text_encoders import load_text_encoders, save_text_encoders
from stepquant.quant.sqnr import sqnr_db
from stepquant.quant.text_encoder import read_text_encoders, write_text_encoders

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("flat icon of a red fox, white background", "")


@pytest.fixture(scope="module")
def options() -> dict:
    spec = importlib.util.spec_from_file_location("demo_arch_sizes", ROOT / "demo" / "comfy_arch" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    models = list(comfy.supported_models.models)
    spec.loader.exec_module(module)
    comfy.supported_models.models[:] = models
    return module.TEXT_CONFIGS


@pytest.fixture
def clip(options) -> comfy.sd.CLIP:
    """Of the demo model's size, random weights of trained ones' scale."""
    clip = comfy.sd.CLIP(TARGET, model_options=options, parameters=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in clip.cond_stage_model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(torch.ones_like(parameter) * (parameter.numel() > 1))
    return clip


class TARGET:
    clip, tokenizer, params = comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer, {}


def encode(clip) -> list[torch.Tensor]:
    found = [clip.encode_from_tokens(clip.tokenize(text), return_pooled=True) for text in TEXTS]
    return [part for pair in found for part in pair]


def test_text_encoders_in_8_bit_condition_as_16_bit_ones_do_in_less_memory(clip, options, tmp_path):
    file = tmp_path / "te.safetensors"
    with torch.inference_mode():
        wanted = encode(clip)
        assert save_text_encoders(clip, file) == file.stat().st_size
        loaded = load_text_encoders(file, model_options=options)
        found = encode(loaded)
    assert all(sqnr_db(reference, test) > 30 for reference, test in zip(wanted, found, strict=True))
    assert not any(torch.equal(reference, test) for reference, test in zip(wanted, found, strict=True))
    layers = [key for key in clip.get_sd() if ".mlp." in key and key.endswith("weight")]
    sizes = [sum(part.patcher.model.state_dict()[key].nbytes for key in layers) for part in (clip, loaded)]
    assert sizes[1] < 0.51 * sizes[0]
    assert type(loaded) is comfy.sd.CLIP


def test_text_encoders_in_8_bit_take_a_lora_and_give_it_back(clip, options, tmp_path):
    file = tmp_path / "te.safetensors"
    with torch.inference_mode():
        save_text_encoders(clip, file)
        loaded = load_text_encoders(file, model_options=options)
        before = encode(loaded)
        key = "clip_g.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
        patched = loaded.clone()
        shape = clip.get_sd()[key].shape
        assert patched.add_patches({key: (torch.randn(shape, generator=torch.Generator().manual_seed(2)),)}, 0.2)
        assert sqnr_db(before[0], encode(patched)[0]) < 30
        assert all(torch.equal(one, other) for one, other in zip(before, encode(loaded), strict=True))


def test_text_encoders_are_made_again_as_comfyui_asks(clip, options, tmp_path):
    file = tmp_path / "te.safetensors"
    with torch.inference_mode():
        save_text_encoders(clip, file)
        loaded = load_text_encoders(file, model_options=options)
        make, arguments = loaded.patcher.cached_patcher_init
        again = make(*arguments, disable_dynamic=True)
        assert again.model is not loaded.patcher.model
        assert all(torch.equal(loaded.get_sd()[key], tensor) for key, tensor in again.model.state_dict().items())


def test_text_encoders_that_are_8_bit_are_not_saved_again(clip, options, tmp_path):
    save_text_encoders(clip, tmp_path / "te.safetensors")
    loaded = load_text_encoders(tmp_path / "te.safetensors", model_options=options)
    with pytest.raises(ModelError, match="quantized already"):
        save_text_encoders(loaded, tmp_path / "again.safetensors")


def test_text_encoder_file_without_a_tensor_or_of_another_size_is_refused(clip, options, tmp_path):
    file = tmp_path / "te.safetensors"
    save_text_encoders(clip, file)
    with pytest.raises(FormatError, match="not SDXL's text encoders"):  # the demo model's, opened as SDXL's
        load_text_encoders(file)
    tensors = read_text_encoders(file)
    del tensors["clip_l.transformer.text_model.final_layer_norm.weight"]
    write_text_encoders(file, tensors, "1")
    with pytest.raises(FormatError, match=r"final_layer_norm\.weight is missing"):
        load_text_encoders(file, model_options=options)


def test_stock_clip_does_not_read_the_codes_as_weights_when_asked_as_we_ask(clip, options, tmp_path):
    """What the file holds is ComfyUI's own format: its operations, not ours, run it."""
    save_text_encoders(clip, tmp_path / "te.safetensors")
    layer = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
    marker = load_file(tmp_path / "te.safetensors")[f"{layer}.comfy_quant"]
    assert bytes(marker.tolist()) == b'{"format": "int8_tensorwise"}'
    loaded = load_text_encoders(tmp_path / "te.safetensors", model_options=options)
    assert type(loaded.cond_stage_model.get_submodule(layer)).__module__ == "comfy.ops"


def test_a_checkpoint_is_not_saved_with_text_encoders_in_8_bit(clip, options, quantized, tmp_path):
    save_text_encoders(clip, tmp_path / "te.safetensors")
    loaded = load_text_encoders(tmp_path / "te.safetensors", model_options=options)
    with pytest.raises(ModelError, match="this CLIP is 8 bit"):
        save_quantized(quantized, tmp_path / "whole.safetensors", clip=loaded)
    assert not (tmp_path / "whole.safetensors").exists()
