"""Save quantized, Load quantized: bit for bit, and every bad file a sentence that names it."""

import json
import os
import struct

import comfy.sd
import pytest
import tiny_sdxl
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stepquant.errors import FormatError, ModelError, StepQuantError
from stepquant.hosts.comfy.attach import state_of
from stepquant.hosts.comfy.loader import fingerprint, load_quantized
from stepquant.hosts.comfy.quantize import quantize_model
from stepquant.hosts.comfy.save import save_quantized

LAYER = "middle_block.1.proj_in"


@pytest.fixture
def file(quantized, tmp_path):
    path = tmp_path / "quantized.safetensors"
    save_quantized(quantized, path, base_model={"name": "tiny", "sha256": "0" * 64})
    return path


def _rewrite(path, change=lambda tensors: None, header=lambda header: None):
    """Edit a file's tensors and StepQuant header in place."""
    with safe_open(str(path), "pt") as opened:
        metadata = opened.metadata()
    tensors, fields = load_file(path), json.loads(metadata["stepquant"])
    change(tensors)
    header(fields)
    save_file(tensors, path, {**metadata, "stepquant": json.dumps(fields)})


def test_reloaded_file_samples_bit_for_bit(quantized, file, sample, snapshot):
    loaded = load_quantized(file)
    assert loaded.clip is None and loaded.vae is None and loaded.header.base_model["name"] == "tiny"
    assert torch.equal(sample(loaded.model), sample(quantized))
    assert state_of(loaded.model).recipe == state_of(quantized).recipe
    before, after = snapshot(quantized), snapshot(loaded.model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_saving_again_gives_the_same_tensors(file, tmp_path):
    again = tmp_path / "again.safetensors"
    save_quantized(load_quantized(file).model, again)
    first, second = load_file(file), load_file(again)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_file_is_as_small_as_its_codes(file, quantized, unet_file):
    assert file.stat().st_size < 0.6 * os.path.getsize(unet_file)
    assert all(tensor.dtype != torch.float32 or key.endswith("weight_scale") for key, tensor in load_file(file).items())


def test_whole_checkpoint_comes_back_with_clip_and_vae(checkpoint_file, tmp_path, sample):
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(checkpoint_file)
    quantized, path = quantize_model(model, "w8a8-token"), tmp_path / "whole.safetensors"
    save_quantized(quantized, path, clip=clip, vae=vae)
    loaded = load_quantized(path)
    assert loaded.header.kind == "checkpoint"
    assert torch.equal(sample(loaded.model), sample(quantized))
    text, latent = "a red fox", torch.zeros(1, 4, 8, 8)
    assert torch.equal(loaded.clip.encode(text), clip.encode(text))
    assert torch.equal(loaded.vae.decode(latent), vae.decode(latent))
    for part, original in ((loaded.clip.patcher, clip.patcher), (loaded.vae.patcher, vae.patcher)):
        rebuilt = part.cached_patcher_init[0](*part.cached_patcher_init[1])
        assert rebuilt.model.state_dict().keys() == original.model.state_dict().keys()


def test_loaded_model_can_be_made_again_by_comfyui(file, sample):
    loaded = load_quantized(file).model
    again = loaded.clone(disable_dynamic=True, force_deepcopy=True)
    assert again.model is not loaded.model
    assert torch.equal(sample(again), sample(loaded))


def test_loaded_model_can_be_copied_for_another_gpu(file, sample):
    loaded = load_quantized(file).model
    copy = loaded.deepclone_multigpu(torch.device("cpu"))
    assert copy.model is not loaded.model and state_of(copy).tap is not state_of(loaded).tap
    assert torch.equal(sample(copy), sample(loaded))


def test_v_prediction_and_nine_channel_models_come_back_as_such(tmp_path, sample):
    source, path = tmp_path / "v.safetensors", tmp_path / "qv.safetensors"
    tiny_sdxl.write_unet(source, v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    model = comfy.sd.load_checkpoint_guess_config(str(source), output_vae=False, output_clip=False)[0]
    quantized = quantize_model(model, "w8a8-token")
    assert quantized.model.model_type == model.model.model_type == comfy.model_base.ModelType.V_PREDICTION
    save_quantized(quantized, path)
    loaded = load_quantized(path).model
    assert loaded.model.model_type == model.model.model_type
    assert torch.equal(loaded.model.model_sampling.sigmas, model.model.model_sampling.sigmas)
    assert torch.equal(sample(loaded), sample(quantized))

    tiny_sdxl.write_unet(source, in_channels=9)
    inpaint = quantize_model(comfy.sd.load_diffusion_model(str(source)), "w8a8-token")
    save_quantized(inpaint, path)
    loaded = load_quantized(path).model
    assert loaded.model.concat_keys == inpaint.model.concat_keys != ()
    assert torch.equal(sample(loaded), sample(inpaint))


def test_fingerprint_changes_with_the_file(file, quantized):
    first = fingerprint(file)
    assert fingerprint(file) == first
    save_quantized(quantized, file, base_model={"name": "other", "sha256": None})
    assert fingerprint(file) != first


@pytest.mark.parametrize("loader", ["checkpoint", "unet"])
def test_stock_loaders_refuse_the_file(file, loader):
    load = comfy.sd.load_checkpoint_guess_config if loader == "checkpoint" else comfy.sd.load_diffusion_model
    with pytest.raises(Exception) as caught:
        load(str(file))
    assert not isinstance(caught.value, StepQuantError)


def test_load_names_the_file_when_truncated(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match=r"quantized\.safetensors.*damaged or incomplete"):
        load_quantized(file)


def test_load_asks_for_an_update_when_the_file_is_newer(file):
    _rewrite(file, header=lambda header: header.update(version=99))
    with pytest.raises(FormatError, match="Update StepQuant"):
        load_quantized(file)


@pytest.mark.parametrize("part", ["qweight", "out_of_the_recipe", "plain"])
def test_load_names_the_tensor_when_one_is_missing(file, part):
    key = {"qweight": f"{LAYER}.qweight", "out_of_the_recipe": f"{LAYER}.weight_scale", "plain": "time_embed.2.weight"}[part]
    _rewrite(file, lambda tensors: tensors.pop("model.diffusion_model." + key))
    with pytest.raises(FormatError, match=key.replace(".", r"\.")):
        load_quantized(file)


def test_load_names_the_layer_when_its_shape_is_of_another_model(file):
    def widen(tensors):
        key = f"model.diffusion_model.{LAYER}.qweight"
        tensors[key] = torch.nn.functional.pad(tensors[key], (0, 16))

    _rewrite(file, widen)
    with pytest.raises(FormatError, match=r"quantized\.safetensors.*middle_block\.1\.proj_in.*this UNet needs"):
        load_quantized(file)


def test_load_names_the_file_when_a_plain_tensor_has_another_shape(file):
    def widen(tensors):
        tensors["model.diffusion_model.time_embed.2.weight"] = torch.zeros(3, 3)

    _rewrite(file, widen)
    with pytest.raises(FormatError, match=r"quantized\.safetensors.*time_embed\.2\.weight"):
        load_quantized(file)


def test_load_names_the_layer_when_a_scale_is_nan(file):
    def spoil(tensors):
        tensors[f"model.diffusion_model.{LAYER}.weight_scale"][3] = torch.nan

    _rewrite(file, spoil)
    with pytest.raises(FormatError, match=r"middle_block\.1\.proj_in.*weight_scale"):
        load_quantized(file)


def test_load_refuses_other_files(unet_file, tmp_path):
    with pytest.raises(FormatError, match="not a StepQuant model"):
        load_quantized(unet_file)
    with pytest.raises(FormatError, match="no such file"):
        load_quantized(tmp_path / "absent.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(struct.pack("<Q", 2**40) + b"{")
    with pytest.raises(FormatError, match="damaged"):
        load_quantized(broken)


def test_load_refuses_a_unet_that_is_no_sdxl(file):
    def strip(tensors):
        for key in [key for key in tensors if ".label_emb." in key]:
            del tensors[key]

    _rewrite(file, strip)
    with pytest.raises(ModelError, match=r"quantized\.safetensors.*SD 1\.x"):
        load_quantized(file)


def test_save_refuses_a_model_that_is_not_quantized(model, tmp_path):
    with pytest.raises(ModelError, match="not quantized"):
        save_quantized(model, tmp_path / "no.safetensors")
    assert not list(tmp_path.iterdir())


def test_save_leaves_nothing_behind_when_the_folder_is_missing(quantized, tmp_path):
    with pytest.raises(FormatError, match="cannot write here"):
        save_quantized(quantized, tmp_path / "absent" / "file.safetensors")
    assert not list(tmp_path.iterdir())


def test_save_holds_the_model_without_loras_and_says_so(quantized, sample, add_lora, tmp_path, caplog):
    base, with_lora = sample(quantized), add_lora(quantized)
    sample(with_lora)
    saved = save_quantized(with_lora, tmp_path / "q.safetensors")
    assert saved.patches_left_out == 4 and "not in the file" in caplog.text
    assert torch.equal(sample(load_quantized(saved.path).model), base)
