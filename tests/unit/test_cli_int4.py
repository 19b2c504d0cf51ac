"""4 bits on the command line: quantize with both roundings, what it says it costs, inspect, and hessians' estimate."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("typer", reason="the command line needs typer and rich (stepquant[demo])")

from typer.testing import CliRunner

from stepquant.cli.app import app
from stepquant.quant.file_format import read_model
from stepquant.quant.rounding.folder import RoundedFolder
from stepquant.quant.rounding.gptq import gptq_int4
from stepquant.quant.rounding.hessian import HessianFolder, HessianObserver

LINEAR = "middle_block.1.proj_in"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def unet(tmp_path):
    """A file that passes for an SDXL UNet, with one Linear that can have 4 bits."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"input_blocks.0.0.weight": (8, 4, 3, 3), "out.2.weight": (4, 8, 3, 3), "label_emb.0.0.weight": (8, 8)}
    shapes |= {f"{LINEAR}.weight": (48, 192), f"{LINEAR}.bias": (48,), "middle_block.0.in_layers.2.weight": (8, 8, 3, 3)}
    save_file({key: torch.randn(shape, generator=generator).half() for key, shape in shapes.items()}, tmp_path / "unet.safetensors")
    return tmp_path / "unet.safetensors"


@pytest.fixture
def hessians(tmp_path):
    observer = HessianObserver(192)
    x = torch.randn(2, 400, 48, generator=torch.Generator().manual_seed(1))
    observer.update(x @ torch.randn(48, 192, generator=torch.Generator().manual_seed(2)))
    HessianFolder(tmp_path / "hessians").write(LINEAR, observer)
    return tmp_path / "hessians"


def test_quantize_writes_4_bit_linears_and_inspect_shows_them(unet, tmp_path):
    out = tmp_path / "out.safetensors"
    assert run("quantize", unet, out, "--preset", "w4a8-token").exit_code == 0
    report = json.loads(run("inspect", out, "--json").stdout)
    assert {scheme["weight_bits"]: scheme["layers"] for scheme in report["schemes"]} == {4: 1, 8: 1}
    assert report["part_bytes"]["codes"] == 48 * 128 + 8 * 8 * 9
    assert "W4" in run("inspect", out).stdout


def test_quantize_rounds_by_gptq_and_says_what_it_costs(unet, hessians, tmp_path):
    out = tmp_path / "out.safetensors"
    result = run("quantize", unet, out, "--preset", "w4a8-token", "--rounding", "gptq", "--hessians", hessians)
    assert result.exit_code == 0, result.output
    assert "rounding gptq: about 1 min" in result.stdout
    run("quantize", unet, tmp_path / "plain.safetensors", "--preset", "w4a8-token")
    codes = {name: read_model(tmp_path / f"{name}.safetensors").layers[LINEAR].qweight for name in ("out", "plain")}
    assert not torch.equal(codes["out"], codes["plain"])
    weight = gptq_int4(_weight(unet), HessianFolder(hessians).read(LINEAR), LINEAR)
    assert torch.equal(codes["out"], weight.packed())


def _weight(unet):
    from safetensors.torch import load_file

    return load_file(unet)[f"{LINEAR}.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounding", "gptq"], "rounding gptq: there are no Hessians"),
        (["--rounding", "reconstruct"], "rounding reconstruct: nothing was learned"),
        (["--rounding", "magic"], "rounding 'magic': unknown"),
        (["--rounding", "gptq", "--hessians", "nowhere"], "is missing, and GPTQ needs it"),
    ],
    ids=["no folder", "nothing learned", "unknown", "empty folder"],
)
def test_quantize_says_in_one_sentence_what_rounding_needs(options, message, unet, tmp_path):
    result = run("quantize", unet, tmp_path / "out.safetensors", "--preset", "w4a8-token", *options)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out.safetensors").exists()


def test_hessians_says_what_gathering_would_take(tmp_path):
    pytest.importorskip("diffusers", reason="the embedded engine needs diffusers (stepquant[demo])")
    result = run("hessians", "demo", tmp_path / "hessians", "--steps", "4", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["runs"] == 1 and report["unet_calls"] % 4 == 0 and not report["gathered"]
    assert not (tmp_path / "hessians").exists()


def test_quantize_takes_what_reconstruct_learned(unet, tmp_path):
    hessian = torch.eye(192) + 0.5
    learned = gptq_int4(_weight(unet), hessian, LINEAR)
    RoundedFolder(tmp_path / "blocks").write("middle_block.1", {LINEAR: learned})
    out = tmp_path / "out.safetensors"
    result = run("quantize", unet, out, "--preset", "w4a8-token", "--rounding", "reconstruct", "--blocks", tmp_path / "blocks")
    assert result.exit_code == 0, result.output
    assert torch.equal(read_model(out).layers[LINEAR].qweight, learned.packed())


def test_reconstruct_says_what_it_would_take(tmp_path):
    pytest.importorskip("diffusers", reason="the embedded engine needs diffusers (stepquant[demo])")
    result = run("reconstruct", "demo", tmp_path / "blocks", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["blocks"] == 17 and report["samples"] == 24 // 2 * 3 * 4 and not report["rounded"]
    text = run("reconstruct", "demo", tmp_path / "blocks", "--dry-run").stdout
    assert "17 blocks on 144 samples" in text and "min here" in text
    assert not (tmp_path / "blocks").exists()
