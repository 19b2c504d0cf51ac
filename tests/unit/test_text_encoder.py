"""SDXL's text encoders in 8 bit: which weights have codes, names of checkpoints, and files that are damaged or not ours."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from stepquant.cli.app import app
from stepquant.errors import FormatError, ModelError, WeightError
from stepquant.quant.sqnr import sqnr_db
from stepquant.quant.text_encoder import from_checkpoint, quantize_text_encoders, read_text_encoders, write_text_encoders

WIDTH, LAYERS = 8, 2
L, G = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."


def checkpoint() -> dict[str, torch.Tensor]:
    """Tiny encoders by the names of an SDXL checkpoint, with another model's tensor beside them."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    tensors = {f"{L}embeddings.token_embedding.weight": random(20, WIDTH), f"{L}embeddings.position_ids": torch.arange(4)}
    tensors |= {f"{G}token_embedding.weight": random(20, WIDTH), f"{G}text_projection": random(WIDTH, 6), f"{G}logit_scale": random(1)}
    tensors |= {f"{G}positional_embedding": random(4, WIDTH), f"{G}ln_final.weight": random(WIDTH), "first_stage_model.x": random(3)}
    for layer in range(LAYERS):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors[f"{L}encoder.layers.{layer}.self_attn.{name}.weight"] = random(WIDTH, WIDTH)
        tensors[f"{L}encoder.layers.{layer}.mlp.fc1.weight"] = random(4 * WIDTH, WIDTH)
        block = f"{G}transformer.resblocks.{layer}."
        tensors |= {f"{block}attn.in_proj_weight": random(3 * WIDTH, WIDTH), f"{block}attn.in_proj_bias": random(3 * WIDTH)}
        tensors |= {f"{block}mlp.c_fc.weight": random(4 * WIDTH, WIDTH), f"{block}ln_1.weight": random(WIDTH)}
    return tensors


@pytest.fixture
def encoders() -> dict[str, torch.Tensor]:
    return from_checkpoint(checkpoint())


def test_text_encoders_of_a_checkpoint_have_comfyuis_names(encoders):
    given, layer = checkpoint(), "clip_g.transformer.text_model.encoder.layers.1."
    whole = given[f"{G}transformer.resblocks.1.attn.in_proj_weight"]
    parts = [encoders[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(encoders["clip_g.transformer.text_projection.weight"], given[f"{G}text_projection"].t())
    assert torch.equal(encoders[f"{layer}layer_norm1.weight"], given[f"{G}transformer.resblocks.1.ln_1.weight"])
    assert "clip_g.transformer.text_model.final_layer_norm.weight" in encoders and "clip_g.logit_scale" in encoders
    assert all(key.startswith(("clip_l.", "clip_g.")) and "position_ids" not in key for key in encoders)


def test_text_encoders_linears_are_int8_and_near_and_the_rest_is_as_it_was(encoders, tmp_path):
    file = tmp_path / "te.safetensors"
    write_text_encoders(file, quantize_text_encoders(encoders, "x"), "1")
    read = read_text_encoders(file)
    for key, tensor in encoders.items():
        if ".encoder.layers." in key and tensor.ndim == 2:
            weight = read[key].float() * read[f"{key.removesuffix('weight')}weight_scale"]
            assert read[key].dtype is torch.int8 and sqnr_db(tensor.float(), weight) > 38
        else:
            assert torch.equal(read[key], tensor)


def test_text_encoders_are_refused_in_words_when_one_is_missing_or_they_are_8_bit(encoders):
    with pytest.raises(ModelError, match="clip_g is missing"):
        quantize_text_encoders({key: tensor for key, tensor in encoders.items() if "clip_l" in key}, "x")
    with pytest.raises(ModelError, match="quantized already"):
        quantize_text_encoders(quantize_text_encoders(encoders, "x"), "x")
    broken = next(key for key in encoders if "mlp" in key)
    with pytest.raises(WeightError, match="NaN or infinite"):
        quantize_text_encoders(encoders | {broken: torch.full_like(encoders[broken], torch.nan)}, "x")


@pytest.mark.parametrize("damage", ["scale missing", "scale NaN", "codes of another type", "another format", "no marker"])
def test_text_encoder_file_that_is_damaged_is_refused(encoders, tmp_path, damage):
    tensors, file = quantize_text_encoders(encoders, "x"), tmp_path / "te.safetensors"
    layer = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1."
    if damage == "scale missing":
        del tensors[f"{layer}weight_scale"]
    elif damage == "scale NaN":
        tensors[f"{layer}weight_scale"][3] = torch.nan
    elif damage == "codes of another type":
        tensors[f"{layer}weight"] = tensors[f"{layer}weight"].half()
    elif damage == "another format":
        tensors[f"{layer}comfy_quant"] = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    else:
        del tensors[f"{layer}comfy_quant"]
    write_text_encoders(file, tensors, "1")
    with pytest.raises(FormatError, match=r"te\.safetensors: the file is damaged .*clip_l"):
        read_text_encoders(file)


def test_text_encoder_file_of_somebody_else_is_refused(encoders, tmp_path):
    save_file(encoders, tmp_path / "other.safetensors")
    with pytest.raises(FormatError, match="not a file of text encoders"):
        read_text_encoders(tmp_path / "other.safetensors")


def test_text_encoders_command_writes_a_file_that_is_read(tmp_path):
    source, out = tmp_path / "sdxl.safetensors", tmp_path / "te.safetensors"
    save_file(checkpoint(), source)
    answer = CliRunner().invoke(app, ["text-encoders", str(source), str(out)])
    assert answer.exit_code == 0 and "two text encoders" in answer.output
    assert read_text_encoders(out).keys() == load_file(out).keys()
    assert CliRunner().invoke(app, ["text-encoders", str(source), str(out)]).exit_code == 1  # exists
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    answer = CliRunner().invoke(app, ["text-encoders", str(tmp_path / "other.safetensors"), str(tmp_path / "y.safetensors")])
    assert answer.exit_code == 1 and not (tmp_path / "y.safetensors").exists()
