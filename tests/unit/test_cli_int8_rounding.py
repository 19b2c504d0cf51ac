"""GPTQ of 8-bit weights on the command line: the codes written, what it says beforehand, and what it asks for."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("typer", reason="the command line needs typer and rich (stepquant[demo])")

from typer.testing import CliRunner

from stepquant.cli.app import app
from stepquant.quant.calibration import Calibration
from stepquant.quant.file_format import read_model
from stepquant.quant.int8_rounding import gptq_int8
from stepquant.quant.rounding.hessian import HessianFolder, HessianObserver
from stepquant.quant.weight import quantize_weight

LINEAR, CONV, PROMPT = "middle_block.1.proj_in", "middle_block.0.in_layers.2", "middle_block.1.transformer_blocks.0.attn2.to_k"
SHAPES = {LINEAR: (48, 64), CONV: (8, 16, 3, 3), PROMPT: (16, 32)}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def quantize(unet, out, *options):
    return run("quantize", unet, out, "--rounding", "gptq", *options)


@pytest.fixture
def unet(tmp_path):
    """A file that passes for an SDXL UNet."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"input_blocks.0.0.weight": (8, 4, 3, 3), "out.2.weight": (4, 8, 3, 3), "label_emb.0.0.weight": (8, 8)}
    shapes |= {f"{name}.weight": shape for name, shape in SHAPES.items()}
    save_file({key: torch.randn(shape, generator=generator).half() for key, shape in shapes.items()}, tmp_path / "unet.safetensors")
    return tmp_path / "unet.safetensors"


@pytest.fixture
def hessians(tmp_path):
    """Of inputs whose channels are alike; the prompt's has none, as `hessians` gathers none."""
    folder = HessianFolder(tmp_path / "hessians")
    for seed, (name, length) in enumerate(((LINEAR, 64), (CONV, 16 * 9)), 1):
        generator, observer = torch.Generator().manual_seed(seed), HessianObserver(length)
        observer.update(torch.randn(500, 12, generator=generator) @ torch.randn(12, length, generator=generator))
        folder.write(name, observer)
    return tmp_path / "hessians"


def test_quantize_rounds_8_bit_linears_and_convolutions_by_gptq_and_says_which(unet, hessians, tmp_path):
    result = quantize(unet, tmp_path / "gptq.safetensors", "--hessians", hessians)
    assert result.exit_code == 0, result.output
    assert "rounding gptq: about 1 min" in result.stdout and "of 8-bit weights 2 of 3 layers, the others plainly" in result.stdout
    found, weights = read_model(tmp_path / "gptq.safetensors").layers, load_file(unet)
    for name in (LINEAR, CONV):
        weight = weights[f"{name}.weight"]
        expected, plain = gptq_int8(weight, HessianFolder(hessians).read(name), name), quantize_weight(weight, name)
        assert torch.equal(found[name].qweight, expected.codes) and not torch.equal(expected.codes, plain.codes)
        assert torch.equal(found[name].weight_scale, plain.scale)
    assert torch.equal(found[PROMPT].qweight, quantize_weight(weights[f"{PROMPT}.weight"], PROMPT).codes)


def test_gptq_of_8_bit_weights_makes_no_larger_file(unet, hessians, tmp_path):
    quantize(unet, tmp_path / "gptq.safetensors", "--hessians", hessians)
    run("quantize", unet, tmp_path / "plain.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("gptq", "plain")]
    assert sizes[0] == sizes[1]


def test_hessians_of_a_4_bit_recipe_leave_convolutions_as_they_were(unet, hessians, tmp_path):
    (hessians / f"{CONV}.safetensors").unlink()
    result = quantize(unet, tmp_path / "out.safetensors", "--preset", "w4a8-token", "--hessians", hessians)
    assert result.exit_code == 0, result.output
    conv = read_model(tmp_path / "out.safetensors").layers[CONV]
    assert torch.equal(conv.qweight, quantize_weight(load_file(unet)[f"{CONV}.weight"], CONV).codes)


def test_quantize_says_so_when_the_folder_has_nothing_for_8_bits(unet, tmp_path):
    result = quantize(unet, tmp_path / "out.safetensors", "--hessians", tmp_path / "nowhere")
    assert result.exit_code == 1 and "Run `hessians --bits 8` first" in " ".join(result.stderr.split())
    assert not (tmp_path / "out.safetensors").exists()


def test_hessians_refuses_other_widths(tmp_path):
    pytest.importorskip("diffusers", reason="the embedded engine needs diffusers (stepquant[demo])")
    result = run("hessians", "demo", tmp_path / "hessians", "--bits", "6")
    assert result.exit_code == 1 and "weights have 8 or 4 bits" in " ".join(result.stderr.split())


def test_hessians_for_8_bits_say_that_they_take_more_than_for_4(tmp_path):
    pytest.importorskip("diffusers", reason="the embedded engine needs diffusers (stepquant[demo])")
    texts = [run("hessians", "demo", tmp_path / "hessians", "--bits", bits, "--dry-run").stdout for bits in (4, 8)]
    inputs = [int(text.split()[0]) for text in texts]
    assert inputs[1] - inputs[0] >= 40  # the convolutions
    assert not (tmp_path / "hessians").exists()


def test_plan_says_so_when_the_folder_is_of_no_layer(unet, tmp_path):
    Calibration({}, {}).save(tmp_path / "cal.safetensors")
    result = run("plan", unet, tmp_path / "cal.safetensors", tmp_path / "plan.json", "--hessians", tmp_path / "nowhere")
    assert result.exit_code == 1 and "holds nothing of this model's layers" in " ".join(result.stderr.split())
